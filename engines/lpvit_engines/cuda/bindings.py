"""The CUDA driver through NVIDIA's cuda-bindings, called as ctypes calls it.

cuda-bindings drops the suffix _v2, returns what ctypes has written through pointers, and wants its
own enumerations; nothing else of it is used. It follows the driver's own versions of each call.
"""

import ctypes
from collections.abc import Callable
from importlib import import_module
from typing import Any

_RENAMED = {"cuGraphInstantiateWithFlags": "cuGraphInstantiate"}
# Which of the arguments that are not written to is an enumeration.
_ENUMERATIONS = {
    "cuDeviceGetAttribute": (0, "CUdevice_attribute"),
    "cuFuncSetAttribute": (1, "CUfunction_attribute"),
    "cuStreamBeginCapture": (1, "CUstreamCaptureMode"),
    "cuPointerGetAttribute": (0, "CUpointer_attribute"),
}


def find_bindings() -> Any | None:
    """cuda.bindings.driver, or None where it is not installed."""
    try:
        return import_module("cuda.bindings.driver")
    except ImportError:
        return None


class BindingsDriver:
    """Functions by the names that libcuda exports, each returning its CUresult as a number."""

    def __init__(self, module: Any) -> None:
        version = getattr(import_module("cuda.bindings"), "__version__", "of unknown version")
        self.through = f"cuda-bindings {version}"
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., int]:
        plain = _RENAMED.get(name, name.removesuffix("_v2"))
        function = getattr(self._module, plain)
        index, enumeration = _ENUMERATIONS.get(plain, (None, ""))

        def call(*arguments: Any) -> int:
            outputs = [x for x in map(_written, arguments) if x is not None]
            given = [_plain(x) for x in arguments if _written(x) is None]
            if index is not None:
                given[index] = getattr(self._module, enumeration)(given[index])
            code, *values = function(*given)
            if int(code) == 0:
                for output, value in zip(outputs, values, strict=True):
                    output.value = _number_or_text(value)
            return int(code)

        setattr(self, name, call)
        return call


def _written(argument: Any) -> Any | None:
    """What a pointer points to, or a buffer for text; None for an argument that is only read."""
    if isinstance(argument, ctypes.Array) and argument._type_ is ctypes.c_char:
        return argument
    return getattr(argument, "_obj", None)  # of ctypes.byref()


def _number_or_text(value: Any) -> int | float | bytes:
    """Text up to the zero that ends it; milliseconds as they are; handles as numbers."""
    if isinstance(value, bytes):
        return value.partition(b"\0")[0]
    return value if isinstance(value, float) else int(value)


def _plain(argument: Any) -> Any:
    """Handles as numbers, an array by its address, no address as 0."""
    if isinstance(argument, ctypes.c_void_p):
        return argument.value or 0
    if isinstance(argument, ctypes.c_int):
        return argument.value
    if isinstance(argument, ctypes.Array):
        return ctypes.addressof(argument)
    return 0 if argument is None else argument
