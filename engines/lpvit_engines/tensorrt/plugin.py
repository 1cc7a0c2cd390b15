"""lpvit::BlockSparseLinear inside TensorRT: an IPluginV3 in Python on the kernels that ship.

One node, its weights as constant inputs (packed by onnx_copy): X (..., in_features) float16, panels
float16, rows int32, columns int32, bias float16 -> Y (..., out_features) float16.

TensorRT may capture the stream into a CUDA graph while it times, so enqueue() neither allocates nor
waits nor loads: the kernel is loaded when the plugin is made, once per process, CUDA context and
shape. Replaying a captured graph runs no Python.
"""

import logging
import threading
from functools import lru_cache
from typing import Any

from lpvit_edge.errors import EngineError, LpvitEdgeError
from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.calls import load_calls
from lpvit_engines.cuda.kernel import Kernel, open_kernel
from lpvit_engines.tensorrt.forms import register_once
from lpvit_engines.tensorrt.plugin_fields import (
    NAME,
    NAMESPACE,
    VERSION,
    named_fields,
    read_fields,
    written_fields,
)
from lpvit_engines.tensorrt.plugin_parts import Launches, Shapes

_LOG = logging.getLogger(__name__)

_kernels: dict[tuple[str, int, int, int, str], Kernel] = {}
_kernels_lock = threading.Lock()


def kernel_for(
    *, block_rows: int, block_cols: int, activation: str, library: str = cuda.LIBRARY
) -> Kernel:
    """The kernel of a shape in the current context, loaded at most once and kept while the context
    is held: unloading it would pull it from under engines and captured graphs that use it."""
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


def take_kernels(library: str, context: int) -> list[Kernel]:
    """What was loaded into a context, for whoever lets it go; its handle may come again."""
    with _kernels_lock:
        keys = [key for key in _kernels if key[:2] == (library, context)]
        return [_kernels.pop(key) for key in keys]


def register(trt: Any, *, library: str = cuda.LIBRARY) -> None:
    """Make the plugin known, before parsing and before loading an engine; again is harmless.

    Raises EngineError where another library, or the form without Python, has its name.
    """

    def with_creator(registry: Any) -> None:
        if not registry.register_creator(_creator(trt, library), NAMESPACE):
            raise EngineError(
                f"TensorRT refused the plugin {NAMESPACE}::{NAME} version {VERSION}; another "
                "library in this process registered one of that name"
            )

    register_once(trt, "python", with_creator)


@lru_cache
def _creator(trt: Any, library: str) -> Any:
    """The one creator of this process; kept here because TensorRT does not keep it alive."""
    return creator_class(trt)(library)


@lru_cache
def plugin_class(trt: Any) -> Any:
    """The plugin class: its bases exist only once tensorrt is imported."""

    class BlockSparseLinear(
        Shapes,
        Launches,
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        def __init__(self, given: dict[str, Any], kernel: Kernel) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version = NAME, VERSION
            self.plugin_namespace, self.num_outputs = NAMESPACE, 1
            self.trt, self.given, self.kernel = trt, given, kernel

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Any:
            # TensorRT may call from a thread of its own, which has no context to load into.
            return plugin_class(trt)(self.given, self.kernel)

        def attach_to_context(self, resource_context: Any) -> Any:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            # Kept on the plugin: TensorRT reads them after this returns.
            self.arrays, self.fields = written_fields(trt, self.given)
            return self.fields

    return BlockSparseLinear


@lru_cache
def creator_class(trt: Any) -> Any:
    """The creator's class, for the same reason."""

    class BlockSparseLinearCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, library: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.library = library
            self.field_names = named_fields(trt)

        def create_plugin(self, name: str, fc: Any, phase: Any) -> Any:
            try:
                given = read_fields(fc)
                shape = {key: given[key] for key in ("block_rows", "block_cols", "activation")}
                return plugin_class(trt)(given, kernel_for(**shape, library=self.library))
            except LpvitEdgeError as error:
                _LOG.error("%s::%s %s: %s", NAMESPACE, NAME, name, error)
                raise

    return BlockSparseLinearCreator
