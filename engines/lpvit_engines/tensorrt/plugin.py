"""lpvit::BlockSparseLinear inside TensorRT: an IPluginV3 in Python on the kernels that ship.

One node, its weights as constant inputs (packed by onnx_copy): X (..., in_features) float16, panels
float16, rows int32, columns int32, bias float16 -> Y (..., out_features) float16.

TensorRT may capture the stream into a CUDA graph while it times, so enqueue() neither allocates nor
waits nor loads: the kernel is loaded when the plugin is made, once per process, CUDA context and
shape. Replaying a captured graph runs no Python.
"""

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from lpvit_edge.errors import EngineError, LpvitEdgeError
from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.calls import load_calls
from lpvit_engines.cuda.kernel import Kernel, open_kernel
from lpvit_engines.cuda.packing import INT32_MAX, PANEL_COLS

NAME, NAMESPACE, VERSION = "BlockSparseLinear", "lpvit", "1"
_INTEGERS = ("block_rows", "block_cols", "in_features", "out_features")
_INDEX_INPUTS = (2, 3)
_LOG = logging.getLogger(__name__)

_kernels: dict[tuple[str, int, int, int, str], Kernel] = {}
_kernels_lock = threading.Lock()


def kernel_for(
    *, block_rows: int, block_cols: int, activation: str, library: str = cuda.LIBRARY
) -> Kernel:
    """The kernel of a shape in the current context, loaded at most once and then kept: unloading
    it would pull it from under engines and captured graphs that still use it."""
    context = load_calls(library).current_context()
    key = (library, context, block_rows, block_cols, activation)
    with _kernels_lock:
        if key not in _kernels:
            _kernels[key] = open_kernel(
                block_rows=block_rows,
                block_cols=block_cols,
                dtype="float16",
                epilogue=activation,
                library=library,
            )
        return _kernels[key]


def read_fields(fields: Any) -> dict[str, Any]:
    """Attributes of the node, from a PluginFieldCollection. Raises EngineError in words."""
    found = {field.name: np.array(field.data) for field in fields}
    missing = [name for name in (*_INTEGERS, "activation") if name not in found]
    if missing:
        raise EngineError(
            f"{NAMESPACE}::{NAME} lacks {', '.join(missing)}: the engine or the ONNX file was made "
            "by another version of lpvit-edge; build it again"
        )
    given: dict[str, Any] = {name: int(found[name].reshape(-1)[0]) for name in _INTEGERS}
    activation = bytes(found["activation"].astype(np.int8).tobytes()).rstrip(b"\0").decode()
    if activation not in ("none", "gelu"):
        raise EngineError(f"{NAMESPACE}::{NAME} has activation {activation!r}; build it again")
    return {**given, "activation": activation}


def check_shapes(given: dict[str, Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse inputs that do not make the layer of the attributes: the kernel trusts them.

    shapes are those of X, panels, rows, columns and bias. Raises EngineError.
    """
    x, panels, rows, columns, bias = shapes
    outputs, inputs = given["out_features"], given["in_features"]
    segments = panels[0] * PANEL_COLS // given["block_cols"] if panels else 0
    if (
        x[-1:] != (inputs,)
        or panels != (*panels[:1], given["block_rows"], PANEL_COLS)
        or rows != (outputs // given["block_rows"], 4)
        or columns != (segments,)
        or bias != (outputs,)
    ):
        raise EngineError(
            f"X {x}, panels {panels}, rows {rows}, columns {columns} and bias {bias} are not those "
            f"of {outputs} outputs and {inputs} inputs in blocks of {given['block_rows']}x"
            f"{given['block_cols']}: export the model again and build it again"
        )
    tokens = math.prod(x[:-1])
    if tokens * max(inputs, outputs) > INT32_MAX:
        raise EngineError(
            f"{tokens} tokens of {max(inputs, outputs)} features: the kernels count up to "
            f"{INT32_MAX} elements; build for a smaller batch"
        )


def upper_shape(described: Any) -> tuple[int, ...]:
    """The shape of a tensor at build, at its largest where TensorRT leaves it open (-1)."""
    sizes = tuple(described.desc.dims)
    return tuple(described.max) if any(size < 0 for size in sizes) else sizes


def register(trt: Any, *, library: str = cuda.LIBRARY) -> None:
    """Make the plugin known, before parsing and before loading an engine; again is harmless."""
    creator = _creator(trt, library)
    registry = trt.get_plugin_registry()
    if registry is None:
        raise EngineError("TensorRT has no plugin registry; reinstall TensorRT")
    if registry.get_creator(NAME, VERSION, NAMESPACE) is not None:
        return
    if not registry.register_creator(creator, NAMESPACE):
        raise EngineError(
            f"TensorRT refused the plugin {NAMESPACE}::{NAME} version {VERSION}; another library "
            "in this process registered one of that name"
        )


@lru_cache
def _creator(trt: Any, library: str) -> Any:
    """The one creator of this process; kept here because TensorRT does not keep it alive."""
    return creator_class(trt)(library)


@contextmanager
def _told() -> Iterator[None]:
    """TensorRT turns an exception into a number; the words go to the log."""
    try:
        yield
    except LpvitEdgeError as error:
        _LOG.error("%s::%s: %s", NAMESPACE, NAME, error)
        raise


@lru_cache
def plugin_class(trt: Any) -> Any:
    """The plugin class: its bases exist only once tensorrt is imported."""

    class BlockSparseLinear(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        def __init__(self, given: dict[str, Any], library: str) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version = NAME, VERSION
            self.plugin_namespace, self.num_outputs = NAMESPACE, 1
            self.given, self.library = given, library
            self.kernel = kernel_for(
                block_rows=given["block_rows"],
                block_cols=given["block_cols"],
                activation=given["activation"],
                library=library,
            )

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            return plugin_class(trt)(self.given, self.library)

        def get_output_data_types(self, input_types: Any) -> Any:
            return [input_types[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, expr_builder: Any) -> Any:
            shape = trt.DimsExprs(inputs[0])
            shape[len(shape) - 1] = expr_builder.constant(self.given["out_features"])
            return [shape]

        def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
            described = in_out[pos].desc
            wanted = trt.DataType.INT32 if pos in _INDEX_INPUTS else trt.DataType.HALF
            return bool(described.type == wanted and described.format == trt.TensorFormat.LINEAR)

        # TensorRT names the first parameter `in`, which Python cannot; it passes by position.
        def configure_plugin(self, in_: Any, out: Any) -> None:
            with _told():
                check_shapes(self.given, [upper_shape(described) for described in in_])

        def on_shape_change(self, in_: Any, out: Any) -> None:
            with _told():
                check_shapes(self.given, [tuple(described.dims) for described in in_])

        def get_workspace_size(self, in_: Any, out: Any) -> int:
            return 0

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, resource_context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            # Kept on the plugin: TensorRT reads them after this returns.
            self.arrays: dict[str, Any] = {
                name: np.array([self.given[name]], np.int32) for name in _INTEGERS
            }
            text = np.frombuffer(self.given["activation"].encode(), np.int8).copy()
            self.arrays["activation"] = text
            fields = [
                trt.PluginField(name, self.arrays[name], trt.PluginFieldType.INT32)
                for name in _INTEGERS
            ]
            fields.append(trt.PluginField("activation", text, trt.PluginFieldType.CHAR))
            self.fields = trt.PluginFieldCollection(fields)
            return self.fields

        def enqueue(
            self,
            input_desc: Any,
            output_desc: Any,
            inputs: Any,
            outputs: Any,
            workspace: int,
            stream: int,
        ) -> None:
            with _told():
                self.kernel.launch(
                    x=inputs[0],
                    values=inputs[1],
                    rows=inputs[2],
                    columns=inputs[3],
                    bias=inputs[4],
                    residual=0,
                    tokens=math.prod(tuple(input_desc[0].dims)[:-1]),
                    ldx=self.given["in_features"],
                    ldy=self.given["out_features"],
                    y=outputs[0],
                    block_row_count=input_desc[2].dims[0],
                    stream=stream,
                )

    return BlockSparseLinear


@lru_cache
def creator_class(trt: Any) -> Any:
    """The creator's class, for the same reason."""

    class BlockSparseLinearCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, library: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.library = library
            none = np.array([], np.int32)
            fields = [trt.PluginField(n, none, trt.PluginFieldType.INT32) for n in _INTEGERS]
            text = np.array([], np.int8)
            fields.append(trt.PluginField("activation", text, trt.PluginFieldType.CHAR))
            self.field_names = trt.PluginFieldCollection(fields)

        def create_plugin(self, name: str, fc: Any, phase: Any) -> Any:
            try:
                return plugin_class(trt)(read_fields(fc), self.library)
            except LpvitEdgeError as error:
                _LOG.error("%s::%s %s: %s", NAMESPACE, NAME, name, error)
                raise

    return BlockSparseLinearCreator
