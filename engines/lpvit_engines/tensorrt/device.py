"""The CUDA device of this process: its primary context, opened and closed."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.calls import Calls, load_calls

_held: Counter[tuple[str, int]] = Counter()  # how often this process holds a context, by library
_held_lock = threading.Lock()


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
    CUDA resets it on its last release, and loaded kernels go with it: with the last one that this
    process holds here they are forgotten, to be loaded anew.
    """
    from lpvit_engines.tensorrt.plugin import forget_kernels

    calls = load_calls(library)
    device = calls.device()
    context = calls.retain_context(device)
    with _held_lock:
        _held[library, context] += 1
    try:
        yield OpenDevice(calls=calls, device=device, context=context)
    finally:
        with _held_lock:
            _held[library, context] -= 1
            if not _held[library, context]:
                forget_kernels(library, context)
            calls.release_context(device)
