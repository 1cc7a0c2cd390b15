"""From the windows of one session to a result, and to every reason to distrust it."""

import statistics
from collections.abc import Iterable

import msgspec
import numpy as np

from lpvit_profilers.base import STUCK, Conditions, Quality, SourceInfo
from lpvit_profilers.energy_records import EnergyMeasurement, EnergyRepeat
from lpvit_profilers.energy_window import Window
from lpvit_profilers.uncertainty import (
    Uncertainty,
    confidence95,
    resolution_term_mw,
    standard_deviation,
)

# Clocks or latency that move by more between repeats mean that the device was not the same.
_MAX_DRIFT = 0.02
_MAX_METHODS_APART = 0.05


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One repeat, and the conditions on both sides of it and while the work ran."""

    window: Window
    before: Conditions
    during: tuple[Conditions, ...]
    after: Conditions


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one energy measurement saw."""

    info: SourceInfo
    window_s: float
    start: Conditions
    end: Conditions
    idle_before: Window
    idle_after: Window
    turns: tuple[Turn, ...]
    averaging_unknown: str | None = None
    unsettled: str | None
    was_suspect: bool


def summarise(session: Session) -> EnergyMeasurement:
    """Median over the repeats that count, its spread, its uncertainty and its doubts."""
    info = session.info
    repeats = tuple(repeat_of(turn) for turn in session.turns)
    good = [r for r in repeats if r.rejected is None]
    per_call = [r.per_call_mj for r in good if r.per_call_mj is not None]
    powers = [r.power_mw for r in good if r.power_mw is not None]
    gross_mj = statistics.median(per_call) if per_call else None
    call_s = statistics.median(r.duration_s / r.calls for r in good) if good else None
    intervals_s = [i for turn in session.turns for i in turn.window.intervals_s]
    clocks = [r.clock_mhz for r in repeats if r.clock_mhz]
    events = [r.throttle_events for r in repeats if r.throttle_events is not None]
    reasons = _reasons(session, repeats)
    return EnergyMeasurement(
        gross_mj=gross_mj,
        net_mj=_net_mj(gross_mj, call_s, session),
        ci95_mj=confidence95(per_call),
        sd_mj=standard_deviation(per_call),
        mean_power_mw=statistics.median(powers) if powers else None,
        idle_before_mw=session.idle_before.power_mw,
        idle_after_mw=session.idle_after.power_mw,
        latency_ms=None if call_s is None else call_s * 1e3,
        uncertainty=_uncertainty(session, per_call, call_s),
        gain_class=info.gain_class,
        source=info.name,
        sensor=info.sensor,
        scope=info.scope,
        quality=_quality(session, gross_mj),
        total_rule=info.total_rule,
        resolution_mw=info.resolution_mw,
        window_s=session.window_s,
        dt_p50_ms=_percentile_ms(intervals_s, 50),
        dt_p99_ms=_percentile_ms(intervals_s, 99),
        repeats=repeats,
        temperature_start_c=session.start.temperature_c,
        temperature_end_c=session.end.temperature_c,
        clock_p50_mhz=statistics.median(clocks) if clocks else None,
        clock_min_mhz=min(clocks, default=None),
        throttle_events=sum(events) if events else None,
        trusted=not reasons,
        reasons=reasons,
    )


def repeat_of(turn: Turn) -> EnergyRepeat:
    """The record of one repeat; a throttled one, or one without energy, is rejected.

    Clock and throttling are those of the running work: some time after it, when the last reading
    has come in, an idle device has its clocks back.
    """
    window, before, after = turn.window, turn.before, turn.after
    rejected = window.reason if window.energy_mj is None else None
    slowed = _distinct(name for c in (*turn.during, after) for name in c.throttling or ())
    if slowed:
        rejected = f"the device was throttled ({', '.join(slowed)})"
    clocks = [c.clock_mhz for c in turn.during if c.clock_mhz]
    return EnergyRepeat(
        energy_mj=window.energy_mj,
        counter_mj=window.counter_mj,
        integral_mj=window.integral_mj,
        duration_s=window.duration_s,
        calls=window.calls,
        samples=window.samples,
        temperature_start_c=before.temperature_c,
        temperature_end_c=after.temperature_c,
        clock_mhz=statistics.median(clocks) if clocks else None,
        throttle_events=after.throttle_events - before.throttle_events
        if after.throttle_events is not None and before.throttle_events is not None
        else None,
        rejected=rejected,
    )


def _net_mj(gross_mj: float | None, call_s: float | None, session: Session) -> float | None:
    idle_mw = _idle_mw(session)
    if gross_mj is None or call_s is None or idle_mw is None:
        return None
    return gross_mj - idle_mw * call_s


def _idle_mw(session: Session) -> float | None:
    before, after = session.idle_before.power_mw, session.idle_after.power_mw
    return None if before is None or after is None else (before + after) / 2


def _quality(session: Session, gross_mj: float | None) -> Quality:
    if gross_mj is None:
        return "unavailable"
    suspect = session.was_suspect or _is_stuck(session)
    return "suspect" if suspect else session.info.quality


def _is_stuck(session: Session) -> bool:
    """A load curve at a steady load gives one value and is no sensor that could be stuck."""
    return session.info.quality != "estimated" and any(t.window.is_stuck for t in session.turns)


def _percentile_ms(intervals_s: list[float], percent: float) -> float | None:
    return float(np.percentile(intervals_s, percent)) * 1e3 if intervals_s else None


def _uncertainty(
    session: Session, per_call_mj: list[float], call_s: float | None
) -> Uncertainty | None:
    """The terms of one call: a power's term times the time of a call, the edge's by its share."""
    if not per_call_mj or call_s is None:
        return None
    info, gross_mj = session.info, statistics.median(per_call_mj)
    windows = [turn.window for turn in session.turns]
    spread_mj = standard_deviation(per_call_mj)
    rounding_mw = resolution_term_mw(
        info.resolution_mw,
        samples=sum(w.samples for w in windows),
        distinct=max(w.distinct for w in windows),
    )
    before, after = session.idle_before.power_mw, session.idle_after.power_mw
    return Uncertainty(
        repeat_mj=None if spread_mj is None else spread_mj / len(per_call_mj) ** 0.5,
        resolution_mj=None if rounding_mw is None else rounding_mw * call_s,
        edge_mj=gross_mj * info.period_s / session.window_s,
        idle_drift_mj=None if before is None or after is None else abs(after - before) / 2 * call_s,
        gain_mj=None if info.gain_class is None else gross_mj * info.gain_class,
    )


def _reasons(session: Session, repeats: tuple[EnergyRepeat, ...]) -> tuple[str, ...]:
    """Everything that speaks against the numbers."""
    windows = [turn.window for turn in session.turns]
    reasons = [f"a repeat was rejected: {text}" for text in _distinct(r.rejected for r in repeats)]
    reasons += _distinct(w.reason for w in windows if w.energy_mj is not None)
    if session.was_suspect:
        reasons.append("some readings contradict each other (a rail above its own total)")
    if _is_stuck(session):
        reasons.append(STUCK)
    if session.averaging_unknown is not None:
        reasons.append(
            f"how far back a reading looks was not found ({session.averaging_unknown}); it is "
            f"taken as {session.info.averaging_s:g} s"
        )
    reasons += _drifts(repeats)
    reasons += _methods_apart(windows)
    for when, idle in (("before", session.idle_before), ("after", session.idle_after)):
        if idle.power_mw is None:
            reasons.append(f"the idle power {when} the work is unknown: {idle.reason}")
    if session.unsettled is not None:
        reasons.append(session.unsettled)
    return tuple(reasons)


def _distinct(texts: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text is not None))


def _drifts(repeats: tuple[EnergyRepeat, ...]) -> list[str]:
    """Over-current events alone are common and harmless; with a moving clock they are not."""
    clocks = [r.clock_mhz for r in repeats if r.clock_mhz]
    calls_s = [r.duration_s / r.calls for r in repeats]
    reasons = []
    if clocks and max(clocks) > (1 + _MAX_DRIFT) * min(clocks):
        reasons.append(
            f"the clock moved between {min(clocks):.0f} and {max(clocks):.0f} MHz; fix the clocks"
        )
    if max(calls_s) > (1 + _MAX_DRIFT) * min(calls_s):
        reasons.append(
            f"the latency moved between {min(calls_s) * 1e3:.4g} and {max(calls_s) * 1e3:.4g} ms"
        )
    events = sum(r.throttle_events or 0 for r in repeats)
    if events and reasons:
        reasons.append(f"the over-current counters rose by {events} meanwhile")
    return reasons


def _methods_apart(windows: list[Window]) -> list[str]:
    apart = [
        abs(w.integral_mj / w.counter_mj - 1)
        for w in windows
        if w.counter_mj and w.integral_mj is not None
    ]
    if not apart or max(apart) <= _MAX_METHODS_APART:
        return []
    return [f"the energy counter and the integrated power differ by {max(apart):.0%}"]
