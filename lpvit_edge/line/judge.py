"""The one thread that runs the engine: a frame in, a verdict out, whatever happens."""

import statistics
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import EngineError, LpvitEdgeError
from lpvit_edge.golden import Agreement, GoldenFrame, agreement, softmax
from lpvit_edge.images import decode_pixels, preprocessed
from lpvit_edge.line.clock import Clock
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.policy import FrameQueue
from lpvit_edge.line.records import FrameRecord, StageLatency
from lpvit_edge.line.settle import Settlement
from lpvit_edge.line.verdict import VerdictRule, action_of, judge

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lpvit_engines import Engine

RELOAD_AFTER = 3  # engine errors in a row
# The median duration of the frames judged last says how long the next one takes.
_REMEMBERED, _NEEDED = 9, 3


class Judge:
    """Takes frames from the queue and settles them. `load` opens the bundle's engine anew."""

    def __init__(
        self,
        bundle: Bundle,
        load: Callable[[], "Engine"],
        queue: FrameQueue,
        settlement: Settlement,
        rule: VerdictRule,
        *,
        source: str,
        clock: Clock,
    ) -> None:
        self._bundle = bundle
        self._load = load
        self._queue = queue
        self._settlement = settlement
        self._rule = rule
        self._source = source
        self._clock = clock
        self._engine: Engine | None = None
        self._errors = 0
        self._durations_ms: deque[float] = deque(maxlen=_REMEMBERED)
        self.passed_ns: int | None = None  # when the engine last answered

    def use(
        self, bundle: Bundle, engine: "Engine", load: Callable[[], "Engine"]
    ) -> "Engine | None":
        """Go on with another bundle, whose engine is open and proven; `load` opens it anew.

        Gives the engine before, which somebody else has to close.
        """
        before = self._engine
        self._bundle, self._engine, self._load = bundle, engine, load
        self._errors = 0
        self._durations_ms.clear()
        self.passed_ns = self._clock.monotonic_ns()
        return before

    def warm_up(self, golden: tuple[tuple[GoldenFrame, bytes], ...]) -> Agreement:
        """Open the engine and run the golden frames through it."""
        self._engine = self._load()
        return agreement(self._engine, golden, self._bundle.record.preprocess)

    def probe(self, golden: tuple[GoldenFrame, bytes]) -> None:
        """Prove, while no part comes, that the engine still answers."""
        pixels = decode_pixels(golden[1], name=golden[0].file)
        try:
            self._answer(preprocessed(pixels, self._bundle.record.preprocess))
        except LpvitEdgeError as error:
            self._failed(error)

    def step(self, timeout_s: float) -> Frame | None:
        """Settle the next frame, whichever way; None when there was none in time."""
        frame = self._queue.take(timeout_s)
        if frame is None:
            return None
        if frame.pixels is None:
            self._settlement.settle_safe(frame, frame.lost or "lost")
        elif self._settlement.is_open(frame.number):
            if self._is_hopeless(frame):
                self._settlement.settle_hopeless(frame)
            else:
                self._judge(frame, frame.pixels)
        return frame

    def _is_hopeless(self, frame: Frame) -> bool:
        """Whether the verdict would come after the deadline, by how long frames took lately.

        Judging it all the same would make the parts behind it late too.
        """
        left_ms = self._settlement.left_ms(frame)
        if left_ms is None or len(self._durations_ms) < _NEEDED:
            return False
        if left_ms >= statistics.median(self._durations_ms):
            return False
        # One disturbance must not condemn all that follow: memory fades while nothing is judged.
        self._durations_ms.popleft()
        return True

    def _judge(self, frame: Frame, pixels: "NDArray[np.uint8]") -> None:
        now = self._clock.monotonic_ns
        taken_ns = now()
        try:
            tensor = preprocessed(pixels, self._bundle.record.preprocess)
            prepared_ns = now()
            outputs = self._answer(tensor)
        except (LpvitEdgeError, ValueError) as error:  # ValueError: pixels that are no image
            self._failed(error)
            self._settlement.settle_safe(frame, f"engine error: {error}")
            return
        done_ns = now()
        self._durations_ms.append((done_ns - taken_ns) / 1e6)
        logits = next(iter(outputs.values()))[0]
        found = judge(softmax(logits), self._bundle.labels, self._rule)
        record = FrameRecord(
            number=frame.number,
            source=self._source,
            captured_at=frame.captured_at,
            captured_ns=frame.captured_ns,
            part_id=frame.name,
            label=found.label,
            confidence=found.confidence,
            probabilities=found.probabilities,
            verdict=found.verdict,
            action=action_of(found.verdict, self._rule),
            reason=found.reason,
            dropped=self._queue.dropped,
            bundle=self._bundle.version,
            latency=StageLatency(
                capture_ms=(frame.received_ns - frame.captured_ns) / 1e6,
                wait_ms=(taken_ns - frame.received_ns) / 1e6,
                preprocess_ms=(prepared_ns - taken_ns) / 1e6,
                infer_ms=(done_ns - prepared_ns) / 1e6,
                total_ms=(now() - frame.captured_ns) / 1e6,
            ),
        )
        features = outputs.get("features")
        self._settlement.settle_late()  # a result after the deadline is no result
        self._settlement.settle(record, pixels, None if features is None else features[0])

    def _answer(self, tensor: "NDArray[np.float32]") -> "dict[str, NDArray[np.float32]]":
        if self._engine is None:
            self._engine = self._load()
        outputs = self._engine.infer_all(tensor[None])
        _refuse_non_finite(outputs)
        self.passed_ns = self._clock.monotonic_ns()
        if self._errors:
            self._errors = 0
            self._settlement.event("engine", "the engine answers again", "info")
        return outputs

    def _failed(self, error: Exception) -> None:
        """Count an error; after some in a row the engine is closed and opened by the next frame."""
        self._errors += 1
        if self._errors == 1:
            self._settlement.event("engine", f"{error}; the safe verdict holds", "alarm")
        if self._errors % RELOAD_AFTER == 0 and self._engine is not None:
            self._engine.close()
            self._engine = None

    def close(self) -> None:
        """Close the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _refuse_non_finite(outputs: "dict[str, NDArray[np.float32]]") -> None:
    """NaN compares with nothing: the first label would win, and no confidence be too low."""
    import numpy as np

    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise EngineError(
                f"the engine answered NaN or infinity in {name!r}; float16 may have overflowed: "
                "build in another precision"
            )


def lost_frame(number: int, *, clock: Clock, why: str) -> Frame:
    """A part of which only the number is known."""
    now_ns = clock.monotonic_ns()
    return Frame(
        number=number,
        captured_at=clock.unix_s(),
        captured_ns=now_ns,
        received_ns=now_ns,
        lost=why,
        untimed=True,
    )


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did, for the last line and for --json."""

    frames: int
    ok: int
    reject: int
    safe: int
    late: int
    dropped: int
    overflowed: int
    capture_restarts: int
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    largest_ms: float
