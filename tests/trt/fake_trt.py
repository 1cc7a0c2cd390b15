"""A stand-in for the tensorrt module with a model behind it, for the run time's tests.

Only what the run time calls; the contract test holds those calls against the real bindings. The
execution context computes on the fake driver's memory, which is host memory.
"""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Compute = Callable[[dict[str, NDArray[np.float32]]], dict[str, NDArray[np.float32]]]
Shapes = dict[str, tuple[int, ...]]


class Context:
    """Runs `compute` on whatever addresses are bound when it is asked to."""

    def __init__(self, shapes: Shapes, compute: Compute) -> None:
        self.shapes, self.compute = shapes, compute
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.fails: str | None = None  # "bind" or "run"
        self.profiler: Any = None

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.fails != "bind"

    def execute_async_v3(self, *, stream_handle: int) -> bool:
        self.streams.append(stream_handle)
        if self.fails == "run":
            return False
        arrays = {name: self._array(name) for name in self.shapes}
        for name, value in self.compute(arrays).items():
            arrays[name][...] = value
        if self.profiler is not None:
            self.profiler.report_layer_time("head + softmax", 0.25)
        return True

    def _array(self, name: str) -> NDArray[np.float32]:
        size = int(np.prod(self.shapes[name]))
        buffer = (ctypes.c_float * size).from_address(self.addresses[name])
        return np.ctypeslib.as_array(buffer).reshape(self.shapes[name])


class Listener:
    """ILogger, IProfiler and IProgressMonitor have nothing of their own."""


def fake_tensorrt(
    shapes: Shapes, compute: Compute, *, inputs: tuple[str, ...] = ("x",)
) -> SimpleNamespace:
    """A module; `contexts` on it lists the execution contexts that were made."""
    modes = SimpleNamespace(INPUT="in", OUTPUT="out")
    types = SimpleNamespace(FLOAT="float32", HALF="float16", INT32="int32")
    contexts: list[Context] = []
    names = list(shapes)

    def create_execution_context() -> Context:
        contexts.append(Context(shapes, compute))
        return contexts[-1]

    engine = SimpleNamespace(
        num_io_tensors=len(names),
        get_tensor_name=lambda i: names[i],
        get_tensor_shape=lambda name: shapes[name],
        get_tensor_mode=lambda name: modes.INPUT if name in inputs else modes.OUTPUT,
        get_tensor_dtype=lambda name: types.FLOAT,
        create_execution_context=create_execution_context,
    )
    runtime = SimpleNamespace(
        deserialize_cuda_engine=lambda plan: engine if plan.startswith(b"plan") else None
    )
    registry = SimpleNamespace(get_creator=lambda *_: object())
    bases = {name: type(name, (), {}) for name in _BASES}
    field = SimpleNamespace(data=[7, 8, 9])
    return SimpleNamespace(
        __version__="10.3.0",
        ILogger=Listener,
        IProfiler=Listener,
        Runtime=lambda logger: runtime,
        TensorIOMode=modes,
        DataType=types,
        PluginFieldType=SimpleNamespace(INT32=0, CHAR=1),
        PluginField=lambda *_: field,
        PluginFieldCollection=list,
        get_plugin_registry=lambda: registry,
        contexts=contexts,
        **bases,
    )


_BASES = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime",
          "IPluginCreatorV3One")  # fmt: skip
