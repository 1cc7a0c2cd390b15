"""The CUDA device of this process: its primary context, opened and closed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.calls import Calls, load_calls


@dataclass(frozen=True, kw_only=True)
class OpenDevice:
    """A device whose primary context is retained."""

    calls: Calls
    device: int
    context: int


@contextmanager
def opened(library: str = cuda.LIBRARY) -> Iterator[OpenDevice]:
    """The first CUDA device. Whoever calls it makes its context current: with device.calls.current.

    The primary context is the one that TensorRT, torch, CuPy and pycuda.autoprimaryctx share.
    """
    calls = load_calls(library)
    device = calls.device()
    context = calls.retain_context(device)
    try:
        yield OpenDevice(calls=calls, device=device, context=context)
    finally:
        calls.release_context(device)
