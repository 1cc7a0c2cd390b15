"""How often a power sensor changes, and how far back one reading looks, found on site."""

import time
from collections.abc import Callable
from itertools import pairwise

import msgspec

ReadPower = Callable[[], float | None]
Clock = Callable[[], int]


class SensorTiming(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """None where the sensor did not change often enough to tell, with the reason."""

    update_period_s: float | None
    averaging_s: float | None
    reason: str | None = None


def probe_update_period(
    read: ReadPower, *, for_s: float = 3.0, clock: Clock = time.monotonic_ns
) -> SensorTiming:
    """Poll as fast as possible; the shortest time between two changes is the update period.

    Real power never stands still, so a value that repeats is one that was not updated. Needs at
    least five changes, because a change between two equal readings hides an update.
    """
    begin_ns, changes_ns, last = clock(), [], read()
    while (now_ns := clock()) - begin_ns < for_s * 1e9:
        value = read()
        if value is not None and value != last:
            changes_ns.append(now_ns)
            last = value
    gaps_ns = [b - a for a, b in pairwise(changes_ns)]
    if len(gaps_ns) < 4:
        reason = f"the power changed {len(changes_ns)} times in {for_s:g} s; probe for longer"
        return SensorTiming(update_period_s=None, averaging_s=None, reason=reason)
    return SensorTiming(update_period_s=min(gaps_ns) / 1e9, averaging_s=None)


def probe_averaging(
    read: ReadPower,
    load: Callable[[], object],
    *,
    for_s: float = 3.0,
    clock: Clock = time.monotonic_ns,
) -> SensorTiming:
    """Step from idle to load and see how long the reading takes to follow.

    A mean over the last W seconds answers a step with a ramp of length W, of which the middle
    80 % (from a tenth to nine tenths of the step) take 0.8 W. `load` is called again and again
    and must be short and synchronous.
    """
    idle = read()
    trace = _trace_under_load(read, load, for_s, clock)
    if idle is None or not trace:
        return SensorTiming(update_period_s=None, averaging_s=None, reason="no reading")
    plateau = sorted(value for _, value in trace[-max(1, len(trace) // 4) :])
    step = plateau[len(plateau) // 2] - idle
    if step < 0.2 * idle:
        reason = f"the load moved the reading by {step:.0f} mW only; use a heavier one"
        return SensorTiming(update_period_s=None, averaging_s=None, reason=reason)
    tenth, nine = (
        next(t for t, value in trace if value >= idle + share * step) for share in (0.1, 0.9)
    )
    return SensorTiming(update_period_s=None, averaging_s=(nine - tenth) / 0.8e9)


def _trace_under_load(
    read: ReadPower, load: Callable[[], object], for_s: float, clock: Clock
) -> list[tuple[int, float]]:
    begin_ns, trace = clock(), []
    while clock() - begin_ns < for_s * 1e9:
        load()
        value = read()
        if value is not None:
            trace.append((clock(), value))
    return trace
