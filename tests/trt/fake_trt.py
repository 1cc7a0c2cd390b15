"""A stand-in for the tensorrt module with a model behind it, for the run time's tests.

Only what the run time calls; the contract test holds those calls against the real bindings. The
execution context computes on the fake driver's memory, which is host memory.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cuda.runtime_driver import Driver

Compute = Callable[[dict[str, NDArray[np.float32]]], dict[str, NDArray[np.float32]]]
Shapes = dict[str, tuple[int, ...]]


class Context:
    """Runs `compute` on whatever addresses are bound when it is asked to; without a driver at once,
    even where its stream is captured."""

    def __init__(self, shapes: Shapes, compute: Compute, driver: Driver | None) -> None:
        self.shapes, self.compute, self.driver = shapes, compute, driver
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
        work = partial(self._work, dict(self.addresses))
        if self.driver is None:
            work()
        else:
            self.driver.enqueue(stream_handle, work)
        if self.profiler is not None:
            self.profiler.report_layer_time("head + softmax", 0.25)
        return True

    def _work(self, addresses: dict[str, int]) -> None:
        arrays = {name: _array(addresses[name], shape) for name, shape in self.shapes.items()}
        for name, value in self.compute(arrays).items():
            arrays[name][...] = value


def _array(address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    buffer = (ctypes.c_float * int(np.prod(shape))).from_address(address)
    return np.ctypeslib.as_array(buffer).reshape(shape)


class Listener:
    """ILogger, IProfiler and IProgressMonitor have nothing of their own."""


def fake_tensorrt(
    shapes: Shapes,
    compute: Compute,
    *,
    inputs: tuple[str, ...] = ("x",),
    driver: Driver | None = None,
) -> SimpleNamespace:
    """A module; `contexts` on it lists the execution contexts that were made. With the fake driver
    under it, captured graphs compute when they are launched."""
    modes = SimpleNamespace(INPUT="in", OUTPUT="out")
    types = SimpleNamespace(FLOAT="float32", HALF="float16", INT32="int32")
    contexts: list[Context] = []
    names = list(shapes)

    def create_execution_context() -> Context:
        contexts.append(Context(shapes, compute, driver))
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
        contexts=contexts,
        driver=driver,
        **bases,
    )


_BASES = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime",
          "IPluginCreatorV3One")  # fmt: skip
