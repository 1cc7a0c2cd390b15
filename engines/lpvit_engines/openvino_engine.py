"""The engine for processors: OpenVINO runs the network, the native kernel its sparse nodes.

A `lpvit::BlockSparseLinear` node of the portable ONNX file becomes an operator that hands pointers
to the kernel; the kernel's tasks run on OpenVINO's own TBB workers. Dense files are accepted too
and run under the same settings, so that the two can be compared.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.inputs import check_input
from lpvit_engines.native import Precision, instruction_set
from lpvit_engines.native_library import tbb_threads
from lpvit_engines.openvino_node import SparseNodes

OLDEST_OPENVINO = 2026
_LOG = logging.getLogger(__name__)


class OpenVinoEngine:
    """An ONNX model with one input, compiled by OpenVINO for this processor.

    With precision "bf16" OpenVINO's own nodes and the sparse nodes compute in bfloat16 and add up
    in float32; input and outputs stay float32. A processor without AVX512_BF16 is refused. With
    "int8" the linear layers, sparse and dense, compute in int8 (native.PackedLayer says how), but
    those of one token an image (the head); the products of attention in bfloat16 on AVX512_BF16,
    the rest in float32. Nothing is calibrated.
    """

    name = "openvino"

    def __init__(
        self, path: Path, *, threads: int | None = None, precision: Precision = "float32"
    ) -> None:
        self.path = path
        self.precision = precision
        self._compiled, self._nodes, self._ours = compile_network(
            path, settings(threads, precision=precision), precision
        )
        self._request: Any = self._compiled.create_infer_request()
        self.input_shape = _shape(self._compiled.inputs[0].partial_shape)
        self.outputs: tuple[str, ...] = tuple(
            output.get_any_name() for output in self._compiled.outputs
        )
        self._is_open = True

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's answer for x, float32 of input_shape; see base.Engine.infer."""
        with self._ran(x):
            return self._output(0)

    def infer_all(self, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Every output for x, by its name; see base.Engine.infer_all."""
        with self._ran(x):
            return {name: self._output(index) for index, name in enumerate(self.outputs)}

    @contextmanager
    def _ran(self, x: NDArray[np.float32]) -> Iterator[None]:
        """Run the model on x, so that the outputs can be read."""
        check_input(x, self.input_shape, is_open=self._is_open)
        with _vendor_errors(f"cannot run {self.path}", self._nodes):
            # OpenVINO reads x in place.
            self._request.infer({0: np.ascontiguousarray(x)}, share_inputs=True)
            yield

    def _output(self, index: int) -> NDArray[np.float32]:
        """A copy, since the next call overwrites the tensor."""
        return np.array(self._request.get_output_tensor(index).data, dtype=np.float32)

    def kernels(self) -> dict[str, str]:
        """Kernel by node of the compiled graph, as OpenVINO reports it; sparse nodes, attention
        and, in int8, dense layers on our kernel by their name in the ONNX file, with the
        instruction set."""
        if not self._is_open:
            raise EngineError("this engine is closed; load it again to ask for its kernels")
        return {**dict(_graph_kernels(self._compiled)), **self._ours}

    def close(self) -> None:
        """Free the compiled model and the packed weights."""
        self._is_open = False
        self._request = self._compiled = None
        self._nodes.close()

    def __enter__(self) -> "OpenVinoEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Network(NamedTuple):
    """A compiled network, and what of it runs on the native kernel."""

    compiled: Any
    nodes: SparseNodes
    """Owns the packed layers: close() it after the last call."""
    ours: dict[str, str]
    """Our kernel by the name of the node that runs on it."""


def compile_network(path: Path, chosen: dict[str, Any], precision: Precision) -> Network:
    """The ONNX model at `path`, compiled with OpenVINO's settings `chosen`.

    Raises EngineError where the file is missing or refused, and EnvironmentUnfitError where this
    processor lacks the precision or OpenVINO is too old.
    """
    if not path.is_file():
        raise EngineError(f"no model file {path}. Give the path of an existing .onnx file")
    instruction_set(precision)  # refuses what this processor lacks, also for a dense model
    openvino = _supported_openvino()
    nodes = SparseNodes(thread_table=_thread_table(), precision=precision)
    with _vendor_errors(f"cannot compile {path}", nodes):
        core = openvino.Core()
        core.add_extension(nodes.extension())
        model = _read_model(core, path)
        nodes.join(model)
        nodes.quantise(model)
        layers = {
            name: f"lpvit_{layer.isa} {layer.pattern}"
            for name, layer in nodes.layers(model).items()
        }
        ours = {**nodes.fuse_attention(model), **layers}
        return Network(core.compile_model(model, "CPU", chosen), nodes, ours)


def _supported_openvino() -> Any:
    """The openvino module; EnvironmentUnfitError for one on which custom operators do not work.

    2024.6 ends the process while it makes one; 2025 reads empty initializers and names differently.
    """
    openvino = require("openvino")
    if int(openvino.__version__.partition(".")[0]) < OLDEST_OPENVINO:
        raise EnvironmentUnfitError(
            f"OpenVINO {openvino.__version__} is too old for the sparse node: it needs "
            f"{OLDEST_OPENVINO}.0 or newer. To get it: pip install -U openvino"
        )
    return openvino


def _read_model(core: Any, path: Path) -> Any:
    """The model in `path`, refused unless it has one input and an answer."""
    model = core.read_model(path)
    if len(model.inputs) != 1 or not model.outputs:
        raise EngineError(
            f"{path} has {len(model.inputs)} inputs and {len(model.outputs)} outputs; this engine "
            "takes models with one input, whose first output is the answer"
        )
    return model


def settings(threads: int | None, *, precision: Precision = "float32") -> dict[str, Any]:
    """What dense and sparse models are both compiled with: one request at a time, no precision
    but the one that was asked for."""
    chosen: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "NUM_STREAMS": 1,
        # Bound to cores, the first thread of every engine in every process would share one: two
        # engines then take turns (benchmarks/cpu_two_engines.py). Alone neither way is faster.
        "ENABLE_CPU_PINNING": False,
    }
    if threads is not None:
        chosen["INFERENCE_NUM_THREADS"] = threads
    return chosen


def _thread_table() -> int | None:
    """TBB's, or None with a warning: the sparse nodes then run on one thread, correctly."""
    try:
        return tbb_threads()
    except EnvironmentUnfitError as error:
        _LOG.warning("sparse layers run on one thread only: %s", error)
        return None


def _shape(shape: Any) -> tuple[int, ...]:
    return tuple(size.get_length() if size.is_static else -1 for size in shape)


def _graph_kernels(compiled: Any) -> Iterator[tuple[str, str]]:
    """(node, primitive) of OpenVINO's graph: no constants, no ends, and none of our operators."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: _text(value) for key, value in node.get_rt_info().items()}
        layer_type = info.get("layerType", "Output")
        # "Reference" is how OpenVINO calls an operator that it hands to somebody else.
        if layer_type not in ("Const", "Input", "Output", "Reference"):
            yield node.get_friendly_name(), f"{layer_type} {info['primitiveType']}"


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


@contextmanager
def _vendor_errors(what: str, nodes: SparseNodes) -> Iterator[None]:
    """OpenVINO raises RuntimeError for everything, also for what our own conversion refused."""
    try:
        yield
    except RuntimeError as error:
        if nodes.refusal is not None:
            raise EngineError(f"{what}: a sparse node is unfit: {nodes.refusal}") from error
        raise EngineError(
            f"{what}: OpenVINO refused with: {error}. Check the file with onnx.checker, and that "
            "OpenVINO is up to date (pip install -U openvino)"
        ) from error
