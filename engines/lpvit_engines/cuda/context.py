"""A CUDA context for threads that have none.

torch makes the primary context current by a thread's first call of the CUDA runtime. A launch is a
call of the driver, and may be the first thing that a thread asks of CUDA where its tensors come
from torch's cache: the driver would answer CUresult 201.
"""

import threading

from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.calls import load_calls

_threads = threading.local()


def ensure_context(device: int, *, library: str = cuda.LIBRARY) -> None:
    """Make a device's primary context current where this thread has none; a thread is asked once.

    device is torch's number. Raises EngineError, EnvironmentUnfitError.
    """
    if getattr(_threads, "has_context", False):
        return
    calls = load_calls(library)
    if not calls.current_context():
        calls.enter(calls.retain_context(calls.device(device)))
    _threads.has_context = True
