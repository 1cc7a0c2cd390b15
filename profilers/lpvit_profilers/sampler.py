"""A thread that reads a power source at irregular times into a ring of fixed size.

The times are irregular on purpose: a sensor that is read every 100 ms while the work repeats
every 10 ms sees the same moment of the work again and again, and no length of measurement cures
that (errors up to 47 % in simulation).
"""

import random
import threading
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.errors import LpvitEdgeError, MeasurementError
from lpvit_profilers.base import STUCK_AFTER, Conditions, PowerSample, PowerSource, SourceInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

JITTER = 0.3
SHORTEST_POLL_S = 0.02
COUNTER_POLL_S = 0.1
CAPACITY = 1 << 16  # 1 MB; 22 minutes at 50 readings a second
_CONDITIONS_KEPT = 4096


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """Readings in order: times (n,) in ns, total power (n,) in mW; NaN is a failed reading."""

    t_ns: "NDArray[np.int64]"
    power_mw: "NDArray[np.float64]"


def poll_interval_s(info: SourceInfo) -> float:
    """How long to wait between readings of a source: twice per update, at most 50 Hz.

    A pure counter misses nothing between two readings, so it is read ten times a second.
    """
    if info.power_from_counter:
        return COUNTER_POLL_S
    return max(SHORTEST_POLL_S, info.period_s / 2)


def jittered(poll_s: float, generator: random.Random) -> float:
    """The next pause: uniform within 30 % of `poll_s`."""
    return poll_s * (1 + JITTER * generator.uniform(-1, 1))


class Sampler:
    """Sample an open source until the with block ends. The memory it takes is fixed.

    With `watch_s` the source's conditions are noted that often as well: what slows a device shows
    only while it works, and is gone when the work has ended.
    """

    def __init__(
        self,
        source: PowerSource,
        *,
        poll_s: float | None = None,
        capacity: int = CAPACITY,
        seed: int | None = None,
        watch_s: float | None = None,
    ) -> None:
        self._source = source
        self.poll_s = poll_interval_s(source.info) if poll_s is None else poll_s
        self._generator = random.Random(seed)
        self._t_ns = np.zeros(capacity, np.int64)
        self._power_mw = np.full(capacity, np.nan)
        self._count = 0
        self._watch_s = watch_s
        self._conditions: deque[tuple[int, Conditions]] = deque(maxlen=_CONDITIONS_KEPT)
        self._last_reason: str | None = None
        self._qualities: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: LpvitEdgeError | None = None
        self.cpu_s = 0.0
        self._thread = threading.Thread(target=self._loop, name="power sampler", daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(10.0)
        if error is None:
            self.check()

    @property
    def count(self) -> int:
        """Readings taken since the start, including those that the ring has forgotten."""
        return self._count

    @property
    def last_reason(self) -> str | None:
        """Why the latest reading that failed did."""
        return self._last_reason

    @property
    def was_suspect(self) -> bool:
        """Whether any reading contradicted itself."""
        return "suspect" in self._qualities

    @property
    def never_moved(self) -> bool:
        """Whether all readings that the ring holds, and they are enough to tell, are the same."""
        power_mw = self.trace().power_mw
        known = power_mw[np.isfinite(power_mw)]
        return len(known) >= STUCK_AFTER and bool((known == known[0]).all())

    def check(self) -> None:
        """Raise what stopped the thread, if anything did."""
        if self._failure is not None:
            raise MeasurementError(
                f"the power sampler stopped: {self._failure}; measure again without other readers"
            ) from self._failure

    def read(self) -> PowerSample:
        """Read the source at once, between two readings of the thread."""
        with self._lock:
            return self._source.sample()

    def trace(self, *, since_ns: int = 0) -> Trace:
        """A copy of the readings from `since_ns` on, in the order they were taken."""
        with self._lock:
            capacity = len(self._t_ns)
            kept = min(self._count, capacity)
            order = np.arange(self._count - kept, self._count) % capacity
            t_ns, power_mw = self._t_ns[order], self._power_mw[order]
        recent = t_ns >= since_ns
        return Trace(t_ns=t_ns[recent], power_mw=power_mw[recent])

    def conditions(self, *, begin_ns: int, end_ns: int) -> tuple[Conditions, ...]:
        """What was noted between two times; () without `watch_s`."""
        with self._lock:
            return tuple(noted for t_ns, noted in self._conditions if begin_ns <= t_ns <= end_ns)

    def _loop(self) -> None:
        try:
            while not self._stop.is_set():
                self._take()
                self._watch()
                self.cpu_s = time.thread_time()
                self._stop.wait(jittered(self.poll_s, self._generator))
        except LpvitEdgeError as error:  # a thread has nobody to raise to; see check()
            self._failure = error

    def _take(self) -> None:
        with self._lock:
            sample = self._source.sample()
            self._qualities.add(sample.quality)
            if sample.total_mw is None:
                self._last_reason = sample.reason
            slot = self._count % len(self._t_ns)
            if self._count and self._t_ns[(self._count - 1) % len(self._t_ns)] >= sample.t_ns:
                return  # the source has nothing new
            self._t_ns[slot] = sample.t_ns
            self._power_mw[slot] = np.nan if sample.total_mw is None else sample.total_mw
            self._count += 1

    def _watch(self) -> None:
        if self._watch_s is None:
            return
        now_ns = time.monotonic_ns()
        if self._conditions and now_ns - self._conditions[-1][0] < self._watch_s * 1e9:
            return
        with self._lock:
            self._conditions.append((now_ns, self._source.conditions()))
