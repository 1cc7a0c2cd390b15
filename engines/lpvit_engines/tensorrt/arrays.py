"""Arrays that already lie on the device: pycuda.gpuarray, CuPy, torch, by what they all offer.

See numba's "CUDA Array Interface (Version 3)" for the keys.
"""

from dataclasses import dataclass
from typing import Any

from lpvit_edge.errors import EngineError
from lpvit_engines.cuda.calls import Calls

_LEGACY, _PER_THREAD = (
    1,
    2,
)  # streams that the interface writes as numbers of their own, as CUDA does


@dataclass(frozen=True, kw_only=True)
class DeviceArray:
    """Where an array lies, and the stream on which it is made; None: it is ready."""

    address: int
    stream: int | None


def device_array(
    array: Any, *, name: str, shape: tuple[int, ...], calls: Calls, context: int, writable: bool
) -> DeviceArray:
    """The address of a float32 array of a shape, in the engine's own context.

    Raises EngineError for anything that could only be used through a copy.
    """
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        raise EngineError(
            f"{name} is a {type(array).__name__} without __cuda_array_interface__; pass a pycuda, "
            "CuPy or torch array on the GPU, or use infer() for arrays on the host"
        )
    if interface["typestr"] not in ("<f4", "=f4") or tuple(interface["shape"]) != shape:
        raise EngineError(
            f"{name} is {interface['typestr']} of shape {tuple(interface['shape'])}; this engine "
            f"wants float32 (<f4) of shape {shape}"
        )
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != _contiguous(shape):
        raise EngineError(f"{name} is not contiguous; make it so, for it is not copied")
    address, read_only = interface["data"]
    if writable and read_only:
        raise EngineError(f"{name} is read-only; give an array that may be written")
    if calls.context_of(address) != context:
        raise EngineError(
            f"{name} belongs to another CUDA context than the engine. With pycuda import "
            "pycuda.autoprimaryctx instead of pycuda.autoinit: the engine uses the primary context"
        )
    return DeviceArray(address=int(address), stream=interface.get("stream"))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 4
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
