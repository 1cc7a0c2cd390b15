"""The fake CUDA driver under the run time, with its knobs; graphs replay what was captured."""

import ctypes
from collections.abc import Callable
from pathlib import Path

from tests.cuda.fake_driver import state_of

_OnReplay = ctypes.CFUNCTYPE(None, ctypes.c_int)


class Driver:
    """The compiled fake as of a Jetson on which nothing has run."""

    def __init__(self, library: Path) -> None:
        self.path = str(library)
        self.state = state_of(library)
        loaded = ctypes.CDLL(self.path)
        self._log = (ctypes.c_char * (1 << 16)).in_dll(loaded, "fake_log")
        self._fails = (ctypes.c_char * 64).in_dll(loaded, "fake_fails")
        self._with = ctypes.c_int.in_dll(loaded, "fake_fails_with")
        self._after = ctypes.c_int.in_dll(loaded, "fake_fails_after")
        self._live = ctypes.c_int.in_dll(loaded, "fake_live")
        self._capturing = ctypes.c_void_p.in_dll(loaded, "fake_capturing")
        self._capture = ctypes.c_int.in_dll(loaded, "fake_capture")
        self.integrated = ctypes.c_int.in_dll(loaded, "fake_integrated")
        self.pointer_context = ctypes.c_void_p.in_dll(loaded, "fake_pointer_context")
        self.pointer_ordinal = ctypes.c_int.in_dll(loaded, "fake_pointer_ordinal")
        self.integrated.value, self._live.value = 0, 0
        self.pointer_context.value, self.pointer_ordinal.value = 0xC0, 0
        self._captured: dict[int, list[Callable[[], object]]] = {}
        self._on_replay = _OnReplay(self._replay)  # kept: the driver calls it
        replay = ctypes.c_void_p.in_dll(loaded, "fake_replay")
        replay.value = ctypes.cast(self._on_replay, ctypes.c_void_p).value
        self.fail("")
        self.forget()

    def fail(self, call: str, result: int = 0, after: int = 0) -> None:
        """Let a call answer `result` from now on, or after so many successes."""
        self._fails.value, self._with.value, self._after.value = call.encode(), result, after

    def forget(self) -> None:
        self._log.value = b""

    def enqueue(self, stream: int, work: Callable[[], object]) -> None:
        """Do some work of a stream, or keep it for the graph that is being captured of it."""
        if self._capturing.value == stream:
            self._captured.setdefault(self._capture.value, []).append(work)
        else:
            work()

    def _replay(self, capture: int) -> None:
        for work in self._captured.get(capture, []):
            work()

    @property
    def calls(self) -> list[str]:
        return self._log.value.decode().splitlines()

    @property
    def names(self) -> list[str]:
        return [call.partition("(")[0] for call in self.calls]

    @property
    def live(self) -> int:
        """Handles and memory given out and not given back."""
        return self._live.value
