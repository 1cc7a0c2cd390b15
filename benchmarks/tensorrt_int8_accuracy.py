"""What int8 on the linear layers costs in accuracy: TensorRT's copies of a model by ONNX Runtime.

    PYTHONPATH=.:engines:profilers python benchmarks/tensorrt_int8_accuracy.py \
        examples/factory_line/model.toml --calibration data/factory_line/calibration \
        --heldout data/factory_line/heldout

Nothing here is TensorRT: the copies that it is given are computed by ONNX Runtime, whose roundings
are not a GPU's. No time is measured.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from numpy.typing import NDArray

from lpvit_edge.export import export_onnx
from lpvit_edge.images import read_all, scan_folder, take
from lpvit_edge.int8 import IMAGES, calibrate
from lpvit_edge.layers import walk
from lpvit_edge.models import load_model
from lpvit_engines.tensorrt.rounding import emulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    given = parser.parse_args()
    model = load_model(given.model, weights=None)
    size = model.preprocess.image_size
    seen = take(scan_folder(given.calibration, labels=model.labels), IMAGES)
    images = read_all(seen, model.preprocess).images
    heldout = read_all(scan_folder(given.heldout, labels=model.labels), model.preprocess)
    assert heldout.targets is not None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        export_onnx(model.module, walk(model.module, image_size=size), {}, path, image_size=size)
        ranges = calibrate(path, images)
        portable = onnx.load(path)
    half = emulated(portable, heldout.images)
    whole = emulated(portable, heldout.images, ranges=ranges.largest)
    print(f"{given.model}: {len(heldout.images)} held-out images, {len(images)} for calibration")
    for name, answers in (("float16", half), ("int8", whole)):
        print(f"{name:8} {_accuracy(answers, heldout.targets):.2f} % correct")
    same = float((half.argmax(1) == whole.argmax(1)).mean())
    error = float(np.sqrt(np.square(whole - half).mean() / np.square(half).mean()))
    print(f"int8 gives {100 * same:.2f} % the class of float16; logits differ by {error:.1%} rms")


def _accuracy(answers: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    return 100.0 * float((answers.argmax(1) == targets).mean())


if __name__ == "__main__":
    main()
