"""Power readings over some time, rail by rail, in memory that does not grow with the time."""

from collections.abc import Iterable

import msgspec

from lpvit_profilers.base import STUCK, STUCK_AFTER, PowerSample, Quality, Scope, SourceInfo
from lpvit_profilers.integrate import MAX_GAP_S


class RailSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rail read, under the board's own name. The mean is over the samples."""

    name: str
    samples: int
    last_mw: float
    mean_mw: float
    min_mw: float
    max_mw: float


class PowerSummary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rails of one source. `total` is None where there was none; `reason` says why, or why
    the quality is suspect.

    `energy_mj` is the total integrated over the samples' own times, None where readings were
    missing for longer than the sensor allows.
    """

    source: str
    sensor: str
    scope: Scope
    quality: Quality
    total_rule: str | None
    resolution_mw: float | None
    duration_s: float
    samples: int
    failed: int
    total: RailSummary | None
    energy_mj: float | None
    rails: tuple[RailSummary, ...]
    reason: str | None
    notes: tuple[str, ...]


class _Running(msgspec.Struct, kw_only=True):
    """One rail as it goes."""

    samples: int = 0
    last_mw: float = 0.0
    sum_mw: float = 0.0
    min_mw: float = float("inf")
    max_mw: float = float("-inf")

    def add(self, value_mw: float) -> None:
        self.samples += 1
        self.last_mw = value_mw
        self.sum_mw += value_mw
        self.min_mw = min(self.min_mw, value_mw)
        self.max_mw = max(self.max_mw, value_mw)

    @property
    def is_stuck(self) -> bool:
        return self.samples >= STUCK_AFTER and self.min_mw == self.max_mw

    def summary(self, name: str) -> RailSummary:
        return RailSummary(
            name=name,
            samples=self.samples,
            last_mw=self.last_mw,
            mean_mw=self.sum_mw / self.samples,
            min_mw=self.min_mw,
            max_mw=self.max_mw,
        )


class _Energy(msgspec.Struct, kw_only=True):
    """Trapezoids between readings; one gap makes the whole unknown."""

    longest_gap_s: float
    previous: tuple[int, float] | None = None
    energy_mj: float | None = None
    has_gap: bool = False

    def add(self, t_ns: int, power_mw: float) -> None:
        if self.previous is not None:
            seconds = (t_ns - self.previous[0]) / 1e9
            self.has_gap |= seconds > self.longest_gap_s
            step_mj = (power_mw + self.previous[1]) / 2 * seconds
            self.energy_mj = (self.energy_mj or 0.0) + step_mj
        self.previous = (t_ns, power_mw)


def summarise_power(info: SourceInfo, samples: Iterable[PowerSample]) -> PowerSummary:
    """Read all samples once. A rail that never answered is absent, not 0."""
    rails: dict[str, _Running] = {}
    total = _Running()
    energy = _Energy(longest_gap_s=max(MAX_GAP_S, 3 * info.period_s))
    first_ns = last_ns = None
    count, reason, quality = 0, None, info.quality
    for sample in samples:
        count += 1
        first_ns = sample.t_ns if first_ns is None else first_ns
        last_ns = sample.t_ns
        for name, value_mw in sample.rails_mw.items():
            rails.setdefault(name, _Running()).add(value_mw)
        if sample.quality == "suspect":
            quality, reason = "suspect", sample.reason
        if sample.total_mw is None:
            reason = sample.reason
            continue
        total.add(sample.total_mw)
        energy.add(sample.t_ns, sample.total_mw)
    # A load curve at a steady load gives one value and is no sensor that could be stuck.
    if quality not in ("suspect", "estimated") and total.is_stuck:
        quality, reason = "suspect", STUCK
    return PowerSummary(
        source=info.name,
        sensor=info.sensor,
        scope=info.scope,
        quality=quality if total.samples else "unavailable",
        total_rule=info.total_rule,
        resolution_mw=info.resolution_mw,
        duration_s=0.0 if first_ns is None or last_ns is None else (last_ns - first_ns) / 1e9,
        samples=count,
        failed=count - total.samples,
        total=total.summary("total") if total.samples else None,
        energy_mj=None if energy.has_gap else energy.energy_mj,
        rails=tuple(running.summary(name) for name, running in rails.items()),
        reason=_reason(quality, reason, has_total=total.samples > 0),
        notes=info.notes,
    )


def _reason(quality: Quality, last: str | None, *, has_total: bool) -> str | None:
    if not has_total:
        return last or "there was no reading"
    return last if quality == "suspect" else None
