"""Quantise an ONNX model to int8 with NNCF, as OpenVINO's users do: the peer of the int8 kernels.

    pip install nncf openvino onnx
    python benchmarks/quantise_nncf.py dense.onnx int8.xml transformer

The calibration images are random: only the speed of what comes out is measured. cpu_engine.py calls
this with the interpreter named by its --nncf.
"""

import sys
from importlib import import_module

import numpy as np
import openvino

IMAGES = 8


def main() -> None:
    source, target, kind = sys.argv[1:]
    nncf = import_module("nncf")  # absent where this project is checked
    rng = np.random.default_rng(0)
    images = [rng.standard_normal((1, 3, 224, 224), dtype=np.float32) for _ in range(IMAGES)]
    quantised = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=IMAGES,
        model_type=nncf.ModelType.TRANSFORMER if kind == "transformer" else None,
    )
    openvino.save_model(quantised, target, compress_to_fp16=False)


if __name__ == "__main__":
    main()
