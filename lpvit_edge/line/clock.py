"""Time as a parameter: the line asks a Clock, and tests hand it one that they turn."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """The two clocks of a machine, and waiting."""

    def monotonic_ns(self) -> int:
        """CLOCK_MONOTONIC, never set back; durations are taken from it."""
        ...

    def unix_s(self) -> float:
        """Time of day, seconds since 1970 UTC; may jump."""
        ...

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until the event is set (True) or the seconds are over (False)."""
        ...


class SystemClock:
    """The clocks of this machine."""

    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def unix_s(self) -> float:
        return time.time()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)


class JumpWatch:
    """Notices when the time of day was set: it then moves otherwise than CLOCK_MONOTONIC."""

    def __init__(self, clock: Clock, *, tolerance_s: float = 2.0) -> None:
        self._clock = clock
        self._tolerance_s = tolerance_s
        self._offset_s = self._offset()

    def jumped_s(self) -> float | None:
        """Seconds by which the time of day jumped since the last call, None where it did not."""
        offset = self._offset()
        jump = offset - self._offset_s
        if abs(jump) < self._tolerance_s:
            return None
        self._offset_s = offset
        return jump

    def _offset(self) -> float:
        return self._clock.unix_s() - self._clock.monotonic_ns() / 1e9
