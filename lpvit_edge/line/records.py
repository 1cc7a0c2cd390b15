"""What the line says about each frame, and to whom.

Two clocks stand in a record: `captured_at` is the time of day, for people and other machines, and
may jump; `captured_ns` is CLOCK_MONOTONIC, one for all processes of a machine since its start, and
is what every duration is taken from.
"""

from typing import TYPE_CHECKING, Literal, Protocol

from lpvit_edge.records import Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Verdict = Literal["ok", "reject", "safe"]
Action = Literal["pass", "reject"]
Severity = Literal["info", "warning", "alarm"]


class StageLatency(Part, frozen=True, kw_only=True):
    """Where a frame's time went. None for a stage that the frame did not reach."""

    capture_ms: float | None = None  # from the capture's time stamp until this process had it
    wait_ms: float | None = None  # in the queue of the policy
    preprocess_ms: float | None = None
    infer_ms: float | None = None
    total_ms: float  # from the trigger until it was decided, before it was written


class FrameRecord(Part, frozen=True, kw_only=True):
    """One frame and what was decided about it.

    `verdict` is "safe" where nothing could be judged (late, overflow, engine error, lost frame);
    `reason` says why, and `action` is what the machine does with the part.
    """

    number: int  # counts on over restarts; a part has one number and one verdict
    source: str
    captured_at: float  # seconds since 1970, UTC
    captured_ns: int  # CLOCK_MONOTONIC
    verdict: Verdict
    action: Action
    latency: StageLatency
    part_id: str | None = None  # the camera's or the line's own number, a file's name
    label: str | None = None
    confidence: float | None = None  # of the label, 0..1
    probabilities: tuple[float, ...] = ()  # in the order of the bundle's labels
    reason: str | None = None
    dropped: int = 0  # frames that the policy dropped so far
    untimed: bool = False  # nobody saw the trigger: both times say when that was noticed
    bundle: str = ""  # first digits of the SHA-256 of model.onnx


class LineEvent(Part, frozen=True, kw_only=True):
    """Something that happened to the line itself: a gap, a reconnect, an alarm."""

    kind: str  # "gap", "source", "capture", "engine", "disk", "sink", "clock", "bundle", "drift"
    text: str
    severity: Severity
    at: float  # seconds since 1970, UTC


class TelemetryHub(Protocol):
    """Who watches the line. Called from the line's own thread: it must return at once."""

    def publish_frame(
        self,
        record: FrameRecord,
        embedding: "NDArray[np.float32] | None",
        image: "NDArray[np.uint8] | None",
    ) -> None:
        """One decided frame; embedding (features,), image (height, width, 3) RGB, None where the
        frame was lost before it could be seen. Both belong to the hub afterwards."""
        ...

    def publish_event(self, kind: str, text: str, severity: Severity, at: float) -> None:
        """Something that happened to the line; see LineEvent."""
        ...
