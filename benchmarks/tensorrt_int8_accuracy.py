"""What int8 on the linear layers costs in accuracy: TensorRT's copies of a model by ONNX Runtime.

    PYTHONPATH=.:engines:profilers python benchmarks/tensorrt_int8_accuracy.py \
        examples/factory_line/model.toml examples/factory_line/swin.toml \
        --calibration data/factory_line/calibration \
        --heldout data/factory_line/heldout --out benchmarks/results/tensorrt_int8_accuracy.json

With each model stands the least that leaving out one of its linear layers moves a logit, a share of
the largest on eight of the images: a tolerance above that would let such an engine pass.

Nothing here is TensorRT: the copies that it is given are computed by ONNX Runtime, whose roundings
are not a GPU's. No time is measured.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from lpvit_edge.check import relative_error
from lpvit_edge.export import export_onnx
from lpvit_edge.images import read_all, scan_folder, take
from lpvit_edge.int8 import IMAGES, answers, calibrate
from lpvit_edge.layers import walk
from lpvit_edge.models import load_model
from lpvit_engines.tensorrt.ranges import inputs_of_linears
from lpvit_engines.tensorrt.rounding import emulated


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+", help="TOML files of models with their weights")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    given = parser.parse_args()
    rows = [row for name in given.models for row in measure(name, given.calibration, given.heldout)]
    if given.out is not None:
        document = {"schema": "lpvit.bench.tensorrt_int8/1", "rows": rows}
        given.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['model']:14} {row['precision']:8} {row['correct']:5} of {row['images']}  "
            f"{100 * row['accuracy']:6.2f} %  other answers {row['other_answers']}  "
            f"largest logit error {row['largest_logit_error']:.4f} "
            f"(one layer left out: {row['least_layer_left_out']:.4f} or more)"
        )


def measure(name: str, calibration: Path, heldout_folder: Path) -> list[dict[str, Any]]:
    """A row for each precision, against the portable file in float32 on the same images."""
    model = load_model(name, weights=None)
    size = model.preprocess.image_size
    seen = take(scan_folder(calibration, labels=model.labels), IMAGES)
    heldout = read_all(scan_folder(heldout_folder, labels=model.labels), model.preprocess)
    assert heldout.targets is not None
    with TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        export_onnx(model.module, walk(model.module, image_size=size), {}, path, image_size=size)
        ranges = calibrate(path, read_all(seen, model.preprocess).images)
        portable = onnx.load(path)
        least = least_layer_left_out(path, heldout.images[:: len(heldout.images) // 8])
        found = {"float32": answers(path, heldout.images)}
    found["float16"] = emulated(portable, heldout.images)
    found["int8"] = emulated(portable, heldout.images, ranges=ranges.largest)
    return [
        {
            "model": Path(name).name,
            "precision": precision,
            "calibration_images": ranges.images if precision == "int8" else None,
            "least_layer_left_out": least,
            **_compared(logits, found["float32"], heldout.targets),
        }
        for precision, logits in found.items()
    ]


def least_layer_left_out(path: Path, images: NDArray[np.float32]) -> float:
    """The smallest largest logit error of the networks that lack one linear layer's weights."""
    portable = onnx.load(path)
    whole = answers(path, images)
    weights = {x.name: x for x in portable.graph.initializer}
    errors = []
    for layer in inputs_of_linears(portable):
        names = (f"{layer}/MatMul", f"{layer}/Gemm")
        node = next(n for n in portable.graph.node if n.name in names)
        weight = weights[node.input[1]]
        kept = numpy_helper.to_array(weight)
        weight.CopyFrom(numpy_helper.from_array(np.zeros_like(kept), weight.name))
        with TemporaryDirectory() as folder:
            without = Path(folder) / "without.onnx"
            onnx.save(portable, without)
            errors.append(relative_error(answers(without, images), whole))
        weight.CopyFrom(numpy_helper.from_array(kept, weight.name))
    return min(errors)


def _compared(
    logits: NDArray[np.float32], reference: NDArray[np.float32], targets: NDArray[np.int64]
) -> dict[str, Any]:
    correct = int((logits.argmax(1) == targets).sum())
    return {
        "images": len(targets),
        "correct": correct,
        "accuracy": correct / len(targets),
        "other_answers": int((logits.argmax(1) != reference.argmax(1)).sum()),
        "largest_logit_error": relative_error(logits, reference),
    }


if __name__ == "__main__":
    main()
