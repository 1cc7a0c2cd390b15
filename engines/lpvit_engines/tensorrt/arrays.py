"""Arrays that already lie on the device: pycuda.gpuarray, CuPy, torch, by what they all offer.

See numba's "CUDA Array Interface (Version 3)" for the keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.device import OpenDevice

_ALIGNMENT = 256  # NvInferRuntime.h, IExecutionContext::setTensorAddress
_KEYS = ("shape", "typestr", "data")


@dataclass(frozen=True, kw_only=True)
class DeviceArray:
    """Where an array lies, and the stream on which it is made; None: it is ready.

    The interface writes the legacy default stream as 1 and that of a thread as 2, as CUDA does.
    """

    address: int
    stream: int | None


def device_array(
    array: Any, *, name: str, shape: tuple[int, ...], device: OpenDevice, writable: bool
) -> DeviceArray:
    """The address of a float32 array of a shape, which the engine can use as it lies there.

    Raises EngineError for anything that could only be used through a copy.
    """
    interface = _interface(array, name)
    found = tuple(interface["shape"])
    if interface["typestr"] not in ("<f4", "=f4") or found != shape:
        raise EngineError(
            f"{name} is {interface['typestr']} of shape {found}; this engine wants float32 (<f4) "
            f"of shape {shape}"
        )
    if not _is_contiguous(interface.get("strides"), shape):
        raise EngineError(f"{name} is not contiguous; make it so, for it is not copied")
    address, read_only = interface["data"]
    if writable and read_only:
        raise EngineError(f"{name} is read-only; give an array that may be written")
    if address % _ALIGNMENT:
        raise EngineError(
            f"{name} lies at {address:#x}; TensorRT wants multiples of {_ALIGNMENT}. Pass a whole "
            "array, or a slice that begins at such an address"
        )
    _refuse_elsewhere(int(address), name, device)
    if interface.get("stream") == 0:
        raise EngineError(
            f"{name} names stream 0, which the interface forbids: 1 is the legacy default stream, "
            "None says that nothing has to be waited for"
        )
    return DeviceArray(address=int(address), stream=interface.get("stream"))


def _interface(array: Any, name: str) -> Mapping[str, Any]:
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise EngineError(
            f"{name} is a {type(array).__name__} without __cuda_array_interface__; pass a pycuda, "
            "CuPy or torch array on the GPU, or use infer() for arrays on the host"
        )
    missing = [key for key in _KEYS if key not in interface]
    if missing:
        raise EngineError(f"the __cuda_array_interface__ of {name} lacks {', '.join(missing)}")
    found: Mapping[str, Any] = interface
    return found


def _is_contiguous(strides: Any, shape: tuple[int, ...]) -> bool:
    """In C's order; how far apart the one element of an axis is, does not matter."""
    if strides is None:
        return True
    step = 4
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _refuse_elsewhere(address: int, name: str, device: OpenDevice) -> None:
    """Raise for memory of another context; that of a pool (cudaMallocAsync) belongs to none, but
    to a device (CUDA's guide, "Stream Ordered Memory Allocator", pointer attributes)."""
    context = device.calls.context_of(address)
    if context is None:
        raise EngineError(
            f"{name} lies at {address:#x}, which is no memory of CUDA's; use infer() for arrays on "
            "the host"
        )
    if context == 0:
        ordinal = device.calls.ordinal_of(address)
        if ordinal != device.ordinal:
            raise EngineError(
                f"{name} lies on device {ordinal}, the engine on device {device.ordinal}; copy it"
            )
    elif context != device.context:
        raise EngineError(
            f"{name} belongs to another CUDA context than the engine. With pycuda import "
            "pycuda.autoprimaryctx instead of pycuda.autoinit: the engine uses the primary context"
        )
