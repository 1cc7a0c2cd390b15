"""The CUDA device of this process: its primary context, opened and closed."""

import logging
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lpvit_edge.errors import LpvitEdgeError
from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.calls import Calls, load_calls

_LOG = logging.getLogger(__name__)
_held: Counter[tuple[str, int]] = Counter()  # how often this process holds a context, by library
_held_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class OpenDevice:
    """A device whose primary context is retained."""

    calls: Calls
    device: int
    context: int
    ordinal: int = 0


@contextmanager
def opened(library: str = cuda.LIBRARY) -> Iterator[OpenDevice]:
    """The first CUDA device. Whoever calls it makes its context current: with device.calls.current.

    The primary context is the one that TensorRT, torch, CuPy and pycuda.autoprimaryctx share.
    CUDA resets it on its last release, and loaded kernels go with it. Others may hold it longer:
    kernels are unloaded with the last one that this process holds here, to be loaded anew.
    """
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
                _unload_kernels(calls, library, context)
            calls.release_context(device)


def _unload_kernels(calls: Calls, library: str, context: int) -> None:
    from lpvit_engines.tensorrt.plugin import take_kernels

    kernels = take_kernels(library, context)
    if not kernels:
        return
    try:
        with calls.current(context):
            for kernel in kernels:
                kernel.close()
    except LpvitEdgeError as error:
        _LOG.debug("a lost context took its kernels along: %s", error)
