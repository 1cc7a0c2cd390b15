"""TensorRT's own progress, handed on: a build on a Jetson is silent for many minutes otherwise."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

# (phase, steps done, steps in all); called from TensorRT's threads.
OnStep: TypeAlias = Callable[[str, int, int], None]


def make_monitor(trt: Any, on_step: OnStep | None, is_stopped: Callable[[], bool]) -> Any:
    """An IProgressMonitor that ends the build once it is stopped; the caller keeps it alive until
    the build is over."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not is_stopped()  # False ends the build

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.get(phase_name, 0))
            self._steps.pop(phase_name, None)

        def _tell(self, phase: str, done: int) -> None:
            if on_step is not None:
                on_step(phase, done, self._steps.get(phase, 0))

    return Monitor()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C came, asked from any thread; KeyboardInterrupt is raised at the end if so,
    whatever else was raised.

    TensorRT's bindings swallow what a callback raises, so the interrupt must not be raised in one,
    and Python's own handler does not run while the main thread is inside TensorRT: the byte that
    the interpreter writes at the signal tells. Outside the main thread, or where a program has a
    handler of its own, signals are not ours.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: False
        return
    came = bytearray()
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setblocking(False)

    def is_stopped() -> bool:
        with suppress(BlockingIOError):
            came.extend(reading.recv(4096))
        return signal.SIGINT in came

    handler = signal.signal(signal.SIGINT, lambda *_: None)
    descriptor = signal.set_wakeup_fd(writing.fileno())
    try:
        yield is_stopped
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGINT, handler)
        stopped = is_stopped()
        reading.close()
        writing.close()
        if stopped:
            raise KeyboardInterrupt
