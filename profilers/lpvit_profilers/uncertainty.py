"""What an energy is uncertain by, term by term, each one standard deviation per call in mJ."""

import math

import msgspec

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (standard tables).
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Uncertainty(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Independent terms, per call, 1 sigma. None is a term that is not known, not a small one.

    `repeat_mj`: spread of the repeats over the root of their number. `resolution_mj`: rounding
    of the sensor. `edge_mj`: the sensor's period against the window. `idle_drift_mj`: half of the
    change of the idle power; it counts for net energy only. `gain_mj`: stated gain class.
    """

    repeat_mj: float | None
    resolution_mj: float | None
    edge_mj: float
    idle_drift_mj: float | None
    gain_mj: float | None

    def combined_gross_mj(self) -> float:
        """Root of the sum of squares of the known terms, without the sensor's gain."""
        return _root_sum(self.repeat_mj, self.resolution_mj, self.edge_mj)

    def combined_net_mj(self) -> float:
        """The same with the drift of the idle power."""
        return _root_sum(self.repeat_mj, self.resolution_mj, self.edge_mj, self.idle_drift_mj)


def _root_sum(*terms: float | None) -> float:
    return math.sqrt(sum(term * term for term in terms if term is not None))


def standard_deviation(values: list[float]) -> float | None:
    """Of a sample; None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def confidence95(values: list[float]) -> float | None:
    """Half width of the 95 % confidence interval of the mean; None for fewer than two values."""
    spread = standard_deviation(values)
    if spread is None:
        return None
    freedom = len(values) - 1
    quantile = _T95[freedom - 1] if freedom <= len(_T95) else 1.960 + 2.5 / freedom
    return quantile * spread / math.sqrt(len(values))


def resolution_term_mw(step_mw: float | None, *, samples: int, distinct: int) -> float | None:
    """Rounding error of a mean of `samples` readings.

    Noise makes rounding average out; a flat load does not dither (fewer than three distinct
    readings), and then the whole step stays uncertain.
    """
    if step_mw is None or samples < 1:
        return None
    if distinct < 3:
        return step_mw
    return step_mw / math.sqrt(12) / math.sqrt(samples)
