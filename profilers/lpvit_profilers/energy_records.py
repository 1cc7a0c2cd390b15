"""What an energy measurement found: records that go into files, and one line for people."""

import math

import msgspec

from lpvit_profilers.base import Quality, Scope
from lpvit_profilers.uncertainty import Uncertainty


class EnergyRepeat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One window of the steady loop. `rejected` says why it does not count, None if it does.

    `energy_mj` is the energy of the whole window, by `counter_mj` where the source has a counter
    and otherwise by `integral_mj`.
    """

    energy_mj: float | None
    counter_mj: float | None
    integral_mj: float | None
    duration_s: float
    calls: int
    samples: int
    temperature_start_c: float | None
    temperature_end_c: float | None
    clock_mhz: float | None
    throttle_events: int | None
    rejected: str | None

    @property
    def per_call_mj(self) -> float | None:
        return None if self.energy_mj is None else self.energy_mj / self.calls

    @property
    def power_mw(self) -> float | None:
        return None if self.energy_mj is None else self.energy_mj / self.duration_s


class EnergyMeasurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Energy of one call of a callable, and everything needed to judge it.

    `gross_mj` is the median over the repeats of all energy in the scope, which is what a battery
    sees; `net_mj` is what lies above the idle power. Both are None with `reasons` when there is
    no number. `ci95_mj` is the half width of the interval of the mean over the repeats. `trusted`
    means that nothing speaks against the numbers; each reason completes "not to be trusted
    because ...".
    """

    gross_mj: float | None
    net_mj: float | None
    ci95_mj: float | None
    sd_mj: float | None
    mean_power_mw: float | None
    idle_before_mw: float | None
    idle_after_mw: float | None
    latency_ms: float | None
    uncertainty: Uncertainty | None
    gain_class: float | None
    source: str
    sensor: str
    scope: Scope
    quality: Quality
    total_rule: str | None
    resolution_mw: float | None
    window_s: float
    dt_p50_ms: float | None
    dt_p99_ms: float | None
    repeats: tuple[EnergyRepeat, ...]
    temperature_start_c: float | None
    temperature_end_c: float | None
    clock_p50_mhz: float | None
    clock_min_mhz: float | None
    throttle_events: int | None
    trusted: bool
    reasons: tuple[str, ...]

    def describe(self) -> str:
        """One line with no more digits than the uncertainty allows.

        "185 mJ ± 2 (repeats) ± 5 % (sensor), 90 mJ above idle, nvml, gpu_board, measured"
        """
        if self.gross_mj is None:
            return f"no energy: {'; '.join(self.reasons)}"
        gross_mj = self.gross_mj
        spread = "" if self.ci95_mj is None else f" ± {_as(self.ci95_mj, gross_mj)} (repeats)"
        gain = (
            "sensor not calibrated"
            if self.gain_class is None
            else f"± {self.gain_class:.0%} (sensor)"
        )
        net = "" if self.net_mj is None else f", {_as(self.net_mj, gross_mj)} mJ above idle"
        text = f"{_as(gross_mj, gross_mj)} mJ{spread}, {gain}{net}"
        return f"{text}, {self.source}, {self.scope}, {self.quality}"


def _as(value: float, like: float) -> str:
    """With as many decimals as give `like` three digits: no sensor here is good for more.

    >>> _as(1.2345, 185.0), _as(1.2345, 12.0), _as(1.2345, 0.0)
    ('1', '1.2', '1')
    """
    decimals = 2 - math.floor(math.log10(abs(like))) if like else 0
    return f"{value:.{max(0, min(9, decimals))}f}"
