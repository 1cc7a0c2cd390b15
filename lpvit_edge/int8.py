"""Calibrate a network for TensorRT's int8 on the user's images, and say what int8 alone changes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.check import relative_error
from lpvit_edge.deps import require
from lpvit_edge.errors import DataError, EngineError
from lpvit_edge.files import write_atomic
from lpvit_edge.progress import say, track, working

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lpvit_engines.tensorrt.ranges import Ranges

IMAGES = 256
_FEWEST = 16
_LEAST_AGREEMENT = 0.95


def calibrate(onnx: Path, images: "NDArray[np.float32]") -> "Ranges":
    """Write model.int8.json beside an ONNX file, from images (n, 3, S, S) as the network sees them.

    The int8 copy is then run by ONNX Runtime on the same images: raises EngineError where fewer
    than 95 % of them keep their class, DataError for fewer than 16 images.
    """
    from lpvit_engines.tensorrt.ranges import encoded, find_ranges, ranges_path
    from lpvit_engines.tensorrt.rounding import emulated

    if len(images) < _FEWEST:
        raise DataError(
            f"int8 is calibrated on images and {len(images)} can be read; give {_FEWEST} or more "
            f"(--calibration, {IMAGES} are used), or build in fp16"
        )

    def steps(starts: Sequence[int]) -> Iterable[int]:
        return track(starts, what=f"int8: calibrate {onnx.name}", total=len(starts))

    found = find_ranges(onnx, images, steps=steps)
    with working(f"int8: {onnx.name} against float32 by ONNX Runtime"):
        single = answers(onnx, images)
        whole = emulated(require("onnx").load(onnx), images, ranges=found.largest)
    agreement = float((whole.argmax(1) == single.argmax(1)).mean())
    error = relative_error(whole, single)
    text = f"{agreement:.1%} of {len(images)} images keep their class in int8, {onnx.name}"
    if agreement < _LEAST_AGREEMENT:
        raise EngineError(
            f"only {text}: this model does not bear int8. Give more calibration images, of every "
            "kind the camera sees, or build in fp16"
        )
    say(text)
    kept = msgspec.structs.replace(found, agreement=agreement, error=error)
    write_atomic(ranges_path(onnx), encoded(kept))
    return kept


def answers(onnx: Path, images: "NDArray[np.float32]") -> "NDArray[np.float32]":
    """First output (n, classes) of a portable file by ONNX Runtime, for images (n, 3, S, S)."""
    session = require("onnxruntime").InferenceSession(onnx, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"images": image[None]})[0] for image in images])
