"""What is known at one moment, as one document: the page, /metrics and other devices read it.

Whatever is not measured is None and stands beside a reason.
"""

from typing import Annotated, ClassVar

import msgspec

from lpvit_edge.records import Part

SCHEMA = "lpvit.now/1"
# From below a millisecond to a missed deadline; a bucket counts what is at most so long.
BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0)

_Text = Annotated[str, msgspec.Meta(max_length=500)]
_Names = Annotated[dict[_Text, float], msgspec.Meta(max_length=64)]


class Power(Part, frozen=True, kw_only=True):
    """The latest reading. Rails keep the board's own names and need not add up to the total.

    `stale` is true when a sensor that answered before has said nothing new for three of its
    periods; `total_w` is then the last that is known, `age_s` old.
    """

    quality: _Text  # measured | summed | estimated | suspect | unavailable
    reason: _Text | None
    source: _Text | None = None
    sensor: _Text | None = None
    scope: _Text | None = None
    total_rule: _Text | None = None
    total_w: float | None = None
    rails_w: _Names = msgspec.field(default_factory=dict)
    age_s: float | None = None
    stale: bool = False
    energy_j: float | None = None  # counted since the start, over gaps not at all
    energy_gap_s: float = 0.0  # time that the counted energy leaves out


class FrameEnergy(Part, frozen=True, kw_only=True):
    """Energy of one frame in joules, each part with where it comes from or why it is missing.

    `gross_j` is the mean power over the frame rate; `idle_j` what the device drew while no frame
    came, over the frame rate; `model_j` what the engine adds to that, from the check on this
    device; `capture_j` is what remains: camera, preprocessing, verdicts.
    """

    gross_j: float | None = None
    idle_j: float | None = None
    model_j: float | None = None
    capture_j: float | None = None
    reason: _Text | None = None


class LatencyNow(Part, frozen=True, kw_only=True):
    """Trigger to verdict of the recent frames; the buckets count all since the start."""

    frames: int  # that the percentiles are of
    p50_ms: float
    p99_ms: float
    p999_ms: float | None  # None below 1000 frames
    stages_p50_ms: _Names
    buckets: Annotated[tuple[int, ...], msgspec.Meta(max_length=len(BUCKETS_S))]
    count: int
    sum_s: float


class FramesNow(Part, frozen=True, kw_only=True):
    """Counters since the start, and the rate of the last seconds."""

    total: int
    per_s: float
    dropped: int
    verdicts: Annotated[dict[_Text, int], msgspec.Meta(max_length=8)]
    labels: Annotated[dict[_Text, int], msgspec.Meta(max_length=64)]
    age_s: float | None  # since the last frame


class DriftNow(Part, frozen=True, kw_only=True):
    """The drift watch; see lpvit_edge.drift.watch.DriftState."""

    level: _Text  # green | yellow | red
    text: _Text | None
    distance: float
    strange_share: float
    evidence: _Names
    yellow_at: float
    red_at: float
    frames: int
    not_watched: int  # frames that came too fast to be looked at


class ShadowNow(Part, frozen=True, kw_only=True):
    """The dense engine beside the line: `escapes` passed what it would reject, `overkills` the
    other way round; `other` disagree in the class and not in the verdict."""

    compared: int
    agreed: int
    escapes: int
    overkills: int
    other: int
    dropped: int  # frames that were meant for it and that it had no time for
    failed: int
    reason: _Text | None = None


class EventNow(Part, frozen=True, kw_only=True):
    """Something that happened."""

    at: float
    kind: _Text
    text: _Text
    severity: _Text  # info | warning | alarm


class Snapshot(Part, frozen=True, kw_only=True):
    """Everything at one moment, `at` seconds since 1970."""

    KIND: ClassVar[str] = SCHEMA

    schema: Annotated[str, msgspec.Meta(pattern="^lpvit[.]now/1$")] = SCHEMA
    at: float
    uptime_s: float
    device: Annotated[dict[_Text, _Text], msgspec.Meta(max_length=32)]
    engine: Annotated[dict[_Text, _Text], msgspec.Meta(max_length=32)] | None
    power: Power
    energy: FrameEnergy
    latency: LatencyNow | None
    frames: FramesNow | None
    drift: DriftNow | None
    drift_reason: _Text | None
    shadow: ShadowNow | None
    shadow_reason: _Text | None
    temperatures_c: _Names
    throttling: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=32)] | None
    throttle_events: int | None
    clock_mhz: float | None
    events: Annotated[tuple[EventNow, ...], msgspec.Meta(max_length=50)]
    event_counts: Annotated[dict[_Text, int], msgspec.Meta(max_length=8)]
    own_cpu_share: float | None = None  # of one core, that this process takes


def series_of(now: Snapshot) -> dict[str, float]:
    """The numbers of a snapshot that the page draws over time, by name; missing ones are absent."""
    found: dict[str, float | None] = {}
    if not now.power.stale:
        found["power"] = now.power.total_w
        found |= {f"rail {name}": value for name, value in now.power.rails_w.items()}
    if now.latency is not None:
        found |= {
            "p50": now.latency.p50_ms,
            "p99": now.latency.p99_ms,
            "p999": now.latency.p999_ms,
        }
    if now.frames is not None:
        found["fps"] = now.frames.per_s
    energy = now.energy
    found |= {
        "gross": energy.gross_j,
        "idle": energy.idle_j,
        "model": energy.model_j,
        "capture": energy.capture_j,
    }
    if now.drift is not None:
        found["drift"] = max(now.drift.evidence.values(), default=None)
        found["distance"] = now.drift.distance
        found["strange"] = now.drift.strange_share
    if now.shadow is not None and now.shadow.compared:
        found["agreement"] = now.shadow.agreed / now.shadow.compared
    found |= {f"temp {zone}": value for zone, value in now.temperatures_c.items()}
    if now.throttling is not None:
        found["throttled"] = float(bool(now.throttling))
    return {name: value for name, value in found.items() if value is not None}
