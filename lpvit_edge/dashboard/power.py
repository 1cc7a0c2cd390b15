"""Power now, from the device's best sensor, counted in joules and honest about its age."""

import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.dashboard.snapshot import Power
from lpvit_edge.errors import LpvitEdgeError
from lpvit_profilers.base import Conditions, PowerSample, PowerSource, SourceInfo, WorkingPart
from lpvit_profilers.integrate import MAX_GAP_S

if TYPE_CHECKING:
    from lpvit_profilers.detect import Detected

_MISSED = 3  # periods without anything new after which a sensor is stale
_SHORTEST_STALE_S = 1.5
_LEAST_POLL_S = 0.1  # the page needs no more than ten readings a second
_RECENT = 600


class PowerMonitor:
    """Reads one power source until it is closed. Without a source it says why there is none."""

    def __init__(self, source: PowerSource | None, *, reason: str | None = None) -> None:
        if source is None and not reason:
            raise ValueError("without a source there must be a reason")
        self._source = source
        self._reason = reason
        self._info: SourceInfo | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._sample: PowerSample | None = None
        self._good: PowerSample | None = None
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._conditions = Conditions()
        self._energy_mj = 0.0
        self._gap_s = 0.0
        self._thread = threading.Thread(target=self._loop, name="power monitor", daemon=True)

    def __enter__(self) -> "PowerMonitor":
        if self._source is not None:
            self._source.open()
            self._info = self._source.info
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._source is not None:
            self._thread.join(10.0)
            self._source.close()

    def now(self, *, t_ns: int | None = None) -> Power:
        """The latest reading. `t_ns` is time.monotonic_ns()."""
        info = self._info
        with self._lock:
            sample, good = self._sample, self._good
            energy_mj, gap_s = self._energy_mj, self._gap_s
            reason = self._reason
        if info is None or (good is None and reason is not None):
            return Power(quality="unavailable", reason=_short(reason or "not opened yet"))
        if good is None:
            waiting = "no reading yet" if sample is None else sample.reason or "no total"
            return _named(info, Power(quality="unavailable", reason=_short(waiting)))
        age_s = max(0.0, ((time.monotonic_ns() if t_ns is None else t_ns) - good.t_ns) / 1e9)
        stale = age_s > max(_MISSED * info.period_s, _SHORTEST_STALE_S)
        power = Power(
            quality=good.quality,
            reason=_short(self._why(stale, sample, reason)),
            total_w=None if good.total_mw is None else good.total_mw / 1000,
            rails_w={
                name: value / 1000
                for name, value in good.rails_mw.items()
                if name != info.total_rule  # it is the total, and must not be counted again
            },
            age_s=age_s,
            stale=stale,
            energy_j=energy_mj / 1000,
            energy_gap_s=gap_s,
        )
        return _named(info, power)

    def mean_w(self, *, seconds: float) -> float | None:
        """Mean of the readings of the last seconds, None where there are fewer than three."""
        with self._lock:
            recent = list(self._recent)
        begin_ns = time.monotonic_ns() - int(seconds * 1e9)
        values = [power_mw for t_ns, power_mw in recent if t_ns >= begin_ns]
        return sum(values) / len(values) / 1000 if len(values) >= 3 else None

    def conditions(self) -> Conditions:
        """What the source sees of throttling and clocks."""
        with self._lock:
            return self._conditions

    @staticmethod
    def _why(stale: bool, sample: PowerSample | None, reason: str | None) -> str | None:
        if not stale:
            return sample.reason if sample is not None else None
        if reason is not None:
            return reason
        return (sample.reason if sample else None) or "the sensor gives nothing new"

    def _loop(self) -> None:
        assert self._source is not None
        assert self._info is not None
        poll_s = max(_LEAST_POLL_S, self._info.period_s / 2)
        watched_ns = 0
        try:
            while not self._stop.wait(poll_s):
                self._take(self._source.sample())
                if time.monotonic_ns() - watched_ns > 1e9:
                    watched_ns = time.monotonic_ns()
                    conditions = self._source.conditions()
                    with self._lock:
                        self._conditions = conditions
        except LpvitEdgeError as error:  # a thread has nobody to raise to; the page says it
            with self._lock:
                self._reason = f"the sensor's reader stopped: {error}"

    def _take(self, sample: PowerSample) -> None:
        with self._lock:
            self._sample = sample
            if sample.total_mw is None or (self._good and sample.t_ns <= self._good.t_ns):
                return
            if self._good is not None and self._good.total_mw is not None:
                self._count(self._good, sample)
            self._good = sample
            self._recent.append((sample.t_ns, sample.total_mw))

    def _count(self, before: PowerSample, after: PowerSample) -> None:
        """Trapezoid between two readings; a gap is counted as a gap and not filled."""
        assert self._info is not None
        seconds = (after.t_ns - before.t_ns) / 1e9
        if seconds > max(MAX_GAP_S, _MISSED * self._info.period_s):
            self._gap_s += seconds
        else:
            self._energy_mj += ((before.total_mw or 0.0) + (after.total_mw or 0.0)) / 2 * seconds


def monitor_of_this_device(
    root: Path = Path("/"), *, working: WorkingPart | None = None
) -> PowerMonitor:
    """The best sensor that measures here and covers the part that works, where one is named.

    Without one, a monitor that says why.
    """
    from lpvit_profilers.detect import default_source, detect, no_sensor, why_none

    source = default_source(root, working=working)
    if source is not None:
        return PowerMonitor(source)
    found: tuple[Detected, ...] = detect(root)
    return PowerMonitor(None, reason=f"{no_sensor(working)}: {why_none(found, working=working)}")


def _named(info: SourceInfo, power: Power) -> Power:
    return msgspec.structs.replace(
        power,
        source=info.name,
        sensor=info.sensor,
        scope=info.scope,
        total_rule=info.total_rule,
    )


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= 500 else text[:497] + "..."
