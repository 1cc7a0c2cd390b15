"""One window of steady work (or of rest), and the energy that a source saw in it."""

import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_profilers.base import STUCK_AFTER, PowerSample, SourceInfo
from lpvit_profilers.integrate import (
    MAX_GAP_S,
    PHASES,
    MeanPower,
    mean_power,
    phase_balanced_mean,
)
from lpvit_profilers.sampler import Sampler, Trace

if TYPE_CHECKING:
    from numpy.typing import NDArray

Step = Callable[[], object]
# A counter steps about every 100 ms on a GPU; one that does not move for longer is dead.
_TICK_LIMIT_S = 0.5
_RESET = "the energy counter was reset, or lost count, while the work ran"
# A power that is a mean over the last second still remembers what was before the window.
_LONG_AVERAGE_S = 0.5
_TRIM_HEAD, _TRIM_TAIL_S = 1.2, 0.2
_MAX_CALLS_NOTED = 1 << 20  # 8 MB; calls short enough to be more need no phase
# So many readings miss one phase in ten by chance once in four thousand windows.
_ENOUGH_FOR_ALIASING = 100


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """`energy_mj` is None with a reason where the source could not tell."""

    begin_ns: int
    end_ns: int
    calls: int
    counter_mj: float | None
    integral_mj: float | None
    samples: int
    distinct: int
    intervals_s: tuple[float, ...]
    reason: str | None

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.begin_ns) / 1e9

    @property
    def energy_mj(self) -> float | None:
        return self.integral_mj if self.counter_mj is None else self.counter_mj

    @property
    def is_stuck(self) -> bool:
        """Whether power that never moved was all there was to go by."""
        return self.counter_mj is None and self.samples >= STUCK_AFTER and self.distinct == 1

    @property
    def power_mw(self) -> float | None:
        return None if self.energy_mj is None else self.energy_mj / self.duration_s


class _Edge(msgspec.Struct, frozen=True, kw_only=True):
    t_ns: int
    energy_mj: float | None
    gaps: int = 0  # how often the counter had lost count
    calls: int  # made while waiting for the edge


def measure_window(step: Step, sampler: Sampler, info: SourceInfo, *, for_s: float) -> Window:
    """Repeat `step` for at least `for_s`. The sampler must be running already.

    With a counter the window opens and closes on one of its steps while the work goes on, so
    that no part of a step is lost. Without one the samples are integrated between the first and
    the last call.
    """
    before = _edge(step, sampler, info)
    deadline_ns = before.t_ns + int(for_s * 1e9)
    calls, begins_ns = 0, array("q")
    while (now_ns := time.monotonic_ns()) < deadline_ns:
        if calls < _MAX_CALLS_NOTED:
            begins_ns.append(now_ns)
        step()
        calls += 1
    begins_ns.append(now_ns)
    after = _edge(step, sampler, info)
    # Until the sensor has seen the end of the window there is nothing to interpolate to.
    time.sleep(2 * sampler.poll_s + 2 * info.period_s)
    noted = np.asarray(begins_ns, np.int64) if calls <= _MAX_CALLS_NOTED else None
    return _evaluate(before, after, calls + after.calls, noted, sampler, info)


def _edge(step: Step, sampler: Sampler, info: SourceInfo) -> _Edge:
    if not info.has_counter:
        return _Edge(t_ns=time.monotonic_ns(), energy_mj=None, calls=0)
    first = _counting(sampler)
    limit_ns = first.t_ns + int(_TICK_LIMIT_S * 1e9)
    calls = 0
    while True:
        step()
        calls += 1
        latest = sampler.read()
        if latest.energy_mj != first.energy_mj and latest.energy_mj is not None:
            return _Edge(
                t_ns=latest.t_ns,
                energy_mj=latest.energy_mj,
                gaps=latest.counter_gaps,
                calls=calls,
            )
        if latest.t_ns > limit_ns:
            return _Edge(t_ns=latest.t_ns, energy_mj=None, calls=calls)


def _counting(sampler: Sampler) -> PowerSample:
    """A reading with a value of the counter, so that the next other value is a step of it."""
    first = latest = sampler.read()
    while latest.energy_mj is None and latest.t_ns < first.t_ns + int(_TICK_LIMIT_S * 1e9):
        time.sleep(0.001)
        latest = sampler.read()
    return latest


def _evaluate(
    before: _Edge,
    after: _Edge,
    calls: int,
    begins_ns: "NDArray[np.int64] | None",
    sampler: Sampler,
    info: SourceInfo,
) -> Window:
    trace = sampler.trace(since_ns=before.t_ns - int(2e9))
    inside = (trace.t_ns > before.t_ns) & (trace.t_ns < after.t_ns)
    counter_mj, lost_count = _counted_mj(before, after)
    mean = _mean_power(before.t_ns, after.t_ns, trace, info)
    mean = _balanced(mean, trace, begins_ns, info)
    seconds = (after.t_ns - before.t_ns) / 1e9
    return Window(
        begin_ns=before.t_ns,
        end_ns=after.t_ns,
        calls=calls,
        counter_mj=counter_mj,
        integral_mj=None if mean.power_mw is None else mean.power_mw * seconds,
        samples=int(inside.sum()),
        distinct=len(np.unique(trace.power_mw[inside])),
        intervals_s=tuple(float(d) / 1e9 for d in np.diff(trace.t_ns[inside])),
        reason=_why(counter_mj, mean, sampler, info, lost_count=lost_count),
    )


def _counted_mj(before: _Edge, after: _Edge) -> tuple[float | None, bool]:
    """Energy between two edges, and whether the counter was reset in between."""
    if before.energy_mj is None or after.energy_mj is None:
        return None, False
    if after.gaps != before.gaps or after.energy_mj < before.energy_mj:
        return None, True
    return after.energy_mj - before.energy_mj, False


def _mean_power(begin_ns: int, end_ns: int, trace: Trace, info: SourceInfo) -> MeanPower:
    """Mean of the samples, without the part in which an averaging sensor still looks back."""
    if info.power_from_counter:  # it would check the counter against itself
        return MeanPower(power_mw=None, samples=0)
    if info.averaging_s >= _LONG_AVERAGE_S:
        begin_ns += int(_TRIM_HEAD * info.averaging_s * 1e9)
        end_ns -= int(_TRIM_TAIL_S * 1e9)
    gap_s = max(MAX_GAP_S, 3 * info.period_s)
    return mean_power(trace.t_ns, trace.power_mw, begin_ns=begin_ns, end_ns=end_ns, max_gap_s=gap_s)


def _balanced(
    mean: MeanPower, trace: Trace, begins_ns: "NDArray[np.int64] | None", info: SourceInfo
) -> MeanPower:
    """The same mean with every phase of a call counting alike, where the samples allow it."""
    if mean.power_mw is None or begins_ns is None or info.averaging_s >= _LONG_AVERAGE_S:
        return mean
    found = phase_balanced_mean(trace.t_ns, trace.power_mw, calls_ns=begins_ns)
    if found.power_mw is not None:
        return MeanPower(power_mw=found.power_mw, samples=found.samples)
    if found.samples >= _ENOUGH_FOR_ALIASING and found.phases_seen < PHASES:
        reason = (
            f"{found.samples} readings met only {found.phases_seen} of {PHASES} parts of a call; "
            "the sensor and the work run in step, change the pace of one of them"
        )
        return MeanPower(power_mw=mean.power_mw, samples=mean.samples, reason=reason)
    return mean


def _why(
    counter_mj: float | None,
    mean: MeanPower,
    sampler: Sampler,
    info: SourceInfo,
    *,
    lost_count: bool,
) -> str | None:
    if counter_mj is not None:
        return None
    failure = _RESET if lost_count else f"the energy counter stood still for {_TICK_LIMIT_S:g} s"
    if mean.power_mw is not None and info.has_counter:
        return f"{failure}; power was integrated"
    if mean.power_mw is not None:
        return mean.reason
    return _RESET if lost_count else sampler.last_reason or mean.reason or failure
