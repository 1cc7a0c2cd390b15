"""How large the inputs of each linear layer get on the user's images, for int8.

Found by ONNX Runtime's calibrator on the portable file, kept beside it as model.int8.json, so that
a device builds the int8 engine again without the images.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError, FileFormatError, MismatchError
from lpvit_engines.tensorrt.graph import Graph
from lpvit_engines.tensorrt.int8_copy import layer_of

KIND, FORMAT = "int8-ranges", 1
PERCENTILE = 99.999  # of |input|: the few beyond it are cut, which costs less than coarser steps
Steps = Callable[[Sequence[int]], Iterable[int]]
_AT_ONCE = 4  # images whose activations are held in memory together


class Ranges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What model.int8.json holds."""

    kind: str
    format: int
    onnx_sha256: str
    images: int
    images_sha256: str  # of their pixels as the network saw them
    percentile: float
    largest: dict[str, float]  # |input| by layer
    agreement: float | None = None  # share of the images that int8 leaves their class
    error: float | None = None  # of the logits, a share of the largest, by ONNX Runtime


def ranges_path(onnx: Path) -> Path:
    return onnx.with_suffix(".int8.json")


def encoded(ranges: Ranges) -> bytes:
    return msgspec.json.format(msgspec.json.encode(ranges), indent=1) + b"\n"


def read_ranges(onnx: Path) -> tuple[Ranges, str]:
    """The ranges beside an ONNX file and the SHA-256 of their file.

    Raises EngineError where there are none, FileFormatError for anything else, and MismatchError
    for those of another network.
    """
    path = ranges_path(onnx)
    if not path.is_file():
        raise EngineError(
            f"{onnx} was not calibrated for int8: there is no {path.name} beside it. Run `lpvit "
            "build --precision int8`, which reads the calibration images, or build in fp16"
        )
    content = path.read_bytes()
    try:
        found = msgspec.json.decode(content, type=Ranges)
    except msgspec.DecodeError as error:
        raise FileFormatError(f"{path}: {error}; build in int8 again") from error
    if (found.kind, found.format) != (KIND, FORMAT):
        raise FileFormatError(f"{path}: {found.kind!r} of format {found.format}; build it again")
    if not all(np.isfinite(x) and x >= 0 for x in found.largest.values()):
        raise FileFormatError(f"{path}: a range is no positive number; build in int8 again")
    if found.onnx_sha256 != hashlib.sha256(onnx.read_bytes()).hexdigest():
        raise MismatchError(
            f"{path} is of another network than {onnx.name}: run `lpvit build --precision int8`"
        )
    return found, hashlib.sha256(content).hexdigest()


def inputs_of_linears(portable: Any) -> dict[str, str]:
    """Input tensor by linear layer, block-sparse ones included: they may be built dense.

    The classifier, whose answer leaves the network, is left out.
    """
    graph = Graph(portable)
    outputs = {output.name for output in portable.graph.output}
    found = {}
    for node in portable.graph.node:
        name = node.name if node.domain == "lpvit" else layer_of(graph, node)
        if name is not None and not _leads_out(portable, node, outputs):
            found[name] = node.input[0]
    return found


def _leads_out(portable: Any, node: Any, outputs: set[str]) -> bool:
    """Whether a product, or its sum with a bias, is an answer of the network."""
    made = {node.output[0]}
    made |= {
        n.output[0]
        for n in portable.graph.node
        if n.op_type == "Add" and made & set(n.input) and n.name.rpartition("/")[0]
        == node.name.rpartition("/")[0]
    }  # fmt: skip
    return bool(made & outputs)


def find_ranges(onnx: Path, images: NDArray[np.float32], *, steps: Steps = iter) -> Ranges:
    """Run images (n, 3, S, S) through a portable file and look at what its linear layers read.

    `steps` is handed the numbers of the images that each step begins with, to show progress.
    """
    portable = require("onnx").load(onnx)
    tensors = inputs_of_linears(portable)
    if not tensors:
        raise EngineError(f"{onnx} has no linear layer that could run in int8; build it in fp16")
    found = _largest(onnx, images, sorted(set(tensors.values())), steps)
    return Ranges(
        kind=KIND,
        format=FORMAT,
        onnx_sha256=hashlib.sha256(onnx.read_bytes()).hexdigest(),
        images=len(images),
        images_sha256=hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest(),
        percentile=PERCENTILE,
        largest={layer: found[tensor] for layer, tensor in tensors.items()},
    )


def _largest(
    onnx: Path, images: NDArray[np.float32], tensors: list[str], steps: Steps
) -> dict[str, float]:
    calibrate = require("onnxruntime.quantization.calibrate")

    base: Any = calibrate.PercentileCalibrater

    class Chosen(base):  # type: ignore[misc]
        """ONNX Runtime's own choice is by operator, and would take attention's products along."""

        def select_tensors_to_calibrate(self, model: Any) -> tuple[set[str], dict[str, Any]]:
            known = {x.name: x for x in (*model.graph.value_info, *model.graph.input)}
            return set(tensors), known

    with TemporaryDirectory() as folder:
        calibrater = Chosen(
            str(onnx),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            symmetric=True,
            percentile=PERCENTILE,
        )
        calibrater.augment_graph()
        calibrater.create_inference_session()
        with redirect_stdout(StringIO()):  # it talks there
            for start in steps(range(0, len(images), _AT_ONCE)):
                calibrater.collect_data(_reader(calibrate, images[start : start + _AT_ONCE]))
            found = calibrater.compute_data()
    return {name: float(np.abs(found[name].range_value).max()) for name in tensors}


def _reader(calibrate: Any, images: NDArray[np.float32]) -> Any:
    left: Iterator[NDArray[np.float32]] = iter(images)

    base: Any = calibrate.CalibrationDataReader

    class Reader(base):  # type: ignore[misc]
        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            image = next(left, None)
            return None if image is None else {"images": image[None]}

    return Reader()
