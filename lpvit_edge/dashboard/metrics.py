"""A snapshot in Prometheus' text form: base units, counters that only grow.

The total and the rails stand under different scopes (the total under the sensor's own, a rail
always under "rail"), so that a sum over a scope never counts a watt twice. What is not measured
has no sample at all.
"""

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from lpvit_edge.dashboard.snapshot import BUCKETS_S, DriftNow, Power, ShadowNow, Snapshot

CONTENT_TYPE = CONTENT_TYPE_LATEST
LEVELS = ("green", "yellow", "red")


def exposition(now: Snapshot) -> bytes:
    """The text of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(now))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, now: Snapshot) -> None:
        self._now = now

    def collect(self) -> Iterable[Metric]:
        now = self._now
        yield InfoMetricFamily("lpvit_build", "This device", value=_labels(now.device))
        if now.engine is not None:
            yield InfoMetricFamily("lpvit_engine", "The running engine", value=_labels(now.engine))
        yield GaugeMetricFamily("lpvit_uptime_seconds", "Since the start", now.uptime_s)
        yield from _power(now.power)
        yield from _line(now)
        if now.drift is not None:
            yield from _drift(now.drift)
        if now.shadow is not None:
            yield from _shadow(now.shadow)
        yield from _conditions(now)


def _labels(facts: Mapping[str, str]) -> dict[str, str]:
    return {name.replace(" ", "_"): value for name, value in facts.items()}


def _power(power: Power) -> Iterator[Metric]:
    names = ["scope", "rail", "source", "quality"]
    watts = GaugeMetricFamily("lpvit_power_watts", "Power now; absent when stale", labels=names)
    source, scope = power.source or "", power.scope or ""
    if power.total_w is not None and not power.stale:
        watts.add_metric([scope, "total", source, power.quality], power.total_w)
        # A total that is summed up has rails that were measured.
        quality = "measured" if power.quality == "summed" else power.quality
        for rail, value in power.rails_w.items():
            watts.add_metric(["rail", rail, source, quality], value)
        yield watts
    if power.energy_j is not None:
        labels = ["scope", "source", "quality"]
        joules = CounterMetricFamily("lpvit_energy_joules", "Energy since the start", labels=labels)
        joules.add_metric([scope, source, power.quality], power.energy_j)
        yield joules
        yield CounterMetricFamily(
            "lpvit_energy_gap_seconds", "Time that the energy leaves out", power.energy_gap_s
        )
    if power.age_s is not None:
        yield GaugeMetricFamily("lpvit_power_age_seconds", "Of the last reading", power.age_s)
    yield GaugeMetricFamily(
        "lpvit_power_available",
        "1 while the sensor answers",
        float(power.total_w is not None and not power.stale),
    )


def _line(now: Snapshot) -> Iterator[Metric]:
    if now.frames is not None:
        frames = CounterMetricFamily("lpvit_frames", "Frames by verdict", labels=["verdict"])
        for verdict, count in now.frames.verdicts.items():
            frames.add_metric([verdict], count)
        yield frames
        yield CounterMetricFamily("lpvit_frames_dropped", "By the policy", now.frames.dropped)
    if now.latency is not None:
        counts = zip(BUCKETS_S, now.latency.buckets, strict=False)
        buckets = [(str(le), float(count)) for le, count in counts]
        buckets.append(("+Inf", float(now.latency.count)))
        yield HistogramMetricFamily(
            "lpvit_trigger_to_verdict_seconds",
            "From capture to verdict",
            buckets=buckets,
            sum_value=now.latency.sum_s,
        )
    parts = {
        "idle": now.energy.idle_j,
        "model": now.energy.model_j,
        "capture": now.energy.capture_j,
    }
    energy = GaugeMetricFamily("lpvit_frame_energy_joules", "One frame's energy", labels=["part"])
    for part, joules in parts.items():
        if joules is not None:
            energy.add_metric([part], joules)
    yield energy
    events = CounterMetricFamily("lpvit_events", "Events by severity", labels=["severity"])
    for severity, count in now.event_counts.items():
        events.add_metric([severity], count)
    yield events


def _drift(drift: DriftNow) -> Iterator[Metric]:
    evidence = GaugeMetricFamily(
        "lpvit_drift_evidence_frames",
        "Mean frames in which a healthy line shows as much once",
        labels=["channel"],
    )
    for channel, frames in drift.evidence.items():
        evidence.add_metric([channel], frames)
    yield evidence
    limits = GaugeMetricFamily(
        "lpvit_drift_threshold_frames", "Where an alarm is raised", labels=["level"]
    )
    limits.add_metric(["yellow"], drift.yellow_at)
    limits.add_metric(["red"], drift.red_at)
    yield limits
    level = LEVELS.index(drift.level) if drift.level in LEVELS else -1
    yield GaugeMetricFamily("lpvit_drift_level", "0 green, 1 yellow, 2 red", level)
    yield GaugeMetricFamily("lpvit_drift_strange_ratio", "Of recent frames", drift.strange_share)
    yield CounterMetricFamily("lpvit_drift_not_watched", "Frames not looked at", drift.not_watched)


def _shadow(shadow: ShadowNow) -> Iterator[Metric]:
    results = CounterMetricFamily(
        "lpvit_shadow_frames", "Frames that the dense engine judged too", labels=["result"]
    )
    for result in ("agreed", "escapes", "overkills", "other", "dropped", "failed"):
        results.add_metric([result], getattr(shadow, result))
    yield results


def _conditions(now: Snapshot) -> Iterator[Metric]:
    zones = GaugeMetricFamily("lpvit_temperature_celsius", "By zone", labels=["zone"])
    for zone, celsius in now.temperatures_c.items():
        zones.add_metric([zone], celsius)
    yield zones
    if now.throttling is not None:
        yield GaugeMetricFamily("lpvit_throttling", "1 while slowed", float(bool(now.throttling)))
    if now.throttle_events is not None:
        yield CounterMetricFamily("lpvit_throttle_events", "Since the boot", now.throttle_events)
    if now.clock_mhz is not None:
        yield GaugeMetricFamily("lpvit_clock_hertz", "Of the processor", now.clock_mhz * 1e6)
