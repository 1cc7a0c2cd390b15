"""Power samples with real, irregular times to energy. Pure functions on arrays."""

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Beyond this nobody knows what the power did.
MAX_GAP_S = 0.5
PHASES = 10
_LEAST_PER_PHASE = 3


class MeanPower(msgspec.Struct, frozen=True, kw_only=True):
    """Mean power of a window, None with a reason where the samples cannot tell."""

    power_mw: float | None
    samples: int
    reason: str | None = None


def mean_power(
    t_ns: "NDArray[np.int64]",
    power_mw: "NDArray[np.float64]",
    *,
    begin_ns: int,
    end_ns: int,
    max_gap_s: float = MAX_GAP_S,
) -> MeanPower:
    """Trapezoids over samples (n,) at times (n,), cut at both edges by interpolation.

    A NaN is a reading that failed and counts as a gap. A gap above `max_gap_s`, at an edge or
    inside, makes the window unknown.
    """
    good = np.isfinite(power_mw)
    t_ns, power_mw = t_ns[good], power_mw[good]
    inside = (t_ns > begin_ns) & (t_ns < end_ns)
    count = int(inside.sum())
    if end_ns <= begin_ns or len(t_ns) < 2:
        return MeanPower(power_mw=None, samples=count, reason="there are fewer than two readings")
    if t_ns[0] > begin_ns or t_ns[-1] < end_ns:
        reason = "the readings do not cover the whole window"
        return MeanPower(power_mw=None, samples=count, reason=reason)
    first, last = np.searchsorted(t_ns, begin_ns, "right") - 1, np.searchsorted(t_ns, end_ns)
    longest_s = float(np.diff(t_ns[first : last + 1]).max()) / 1e9
    if longest_s > max_gap_s:
        reason = (
            f"the sensor gave nothing for {longest_s:.2f} s (at most {max_gap_s:g} s is bridged)"
        )
        return MeanPower(power_mw=None, samples=count, reason=reason)
    # Seconds from the beginning: nanoseconds since boot would lose digits in a float.
    at_s = (t_ns - begin_ns) / 1e9
    length_s = (end_ns - begin_ns) / 1e9
    edges_mw = np.interp([0.0, length_s], at_s, power_mw)
    x = np.concatenate(([0.0], at_s[inside], [length_s]))
    y = np.concatenate((edges_mw[:1], power_mw[inside], edges_mw[1:]))
    energy_mj = float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)))
    return MeanPower(power_mw=energy_mj / length_s, samples=count)


class PhaseMean(msgspec.Struct, frozen=True, kw_only=True):
    """Mean power over the phases of a repeated call, None where the samples cannot tell."""

    power_mw: float | None
    samples: int
    phases_seen: int


def phase_balanced_mean(
    t_ns: "NDArray[np.int64]", power_mw: "NDArray[np.float64]", *, calls_ns: "NDArray[np.int64]"
) -> PhaseMean:
    """Mean power of calls that begin at `calls_ns` (m,), each part of a call counting alike.

    Samples (n,) at random times meet some parts of a call more often than others, and that is
    most of their error. Here each sample is put into one of ten phases of the call it falls
    into, and the means of the phases are averaged: half the error for a square wave. None when a
    phase has fewer than three samples; an empty phase among many samples is aliasing.
    """
    good = np.isfinite(power_mw)
    t_ns, power_mw = t_ns[good], power_mw[good]
    call = np.searchsorted(calls_ns, t_ns, "right") - 1
    inside = (call >= 0) & (call < len(calls_ns) - 1)
    t_ns, power_mw, call = t_ns[inside], power_mw[inside], call[inside]
    if not len(t_ns):
        return PhaseMean(power_mw=None, samples=0, phases_seen=0)
    share = (t_ns - calls_ns[call]) / (calls_ns[call + 1] - calls_ns[call])
    phase = np.minimum((share * PHASES).astype(np.intp), PHASES - 1)
    counts = np.bincount(phase, minlength=PHASES)
    seen = int((counts > 0).sum())
    if counts.min() < _LEAST_PER_PHASE:
        return PhaseMean(power_mw=None, samples=len(t_ns), phases_seen=seen)
    means = np.bincount(phase, power_mw, minlength=PHASES) / counts
    return PhaseMean(power_mw=float(means.mean()), samples=len(t_ns), phases_seen=seen)
