"""Each part gets one verdict, in time: the judge's, or the safe one at the deadline."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.line.clock import Clock
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.percentiles import LatencyHistogram
from lpvit_edge.line.records import FrameRecord, LineEvent, Severity, StageLatency
from lpvit_edge.line.verdict import VerdictRule, action_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# The deadlines are looked at that often within one, and at once for a part that comes later.
LOOKS = 4
Told = Callable[[FrameRecord, "NDArray[np.uint8] | None", "NDArray[np.float32] | None"], None]


class Counts(msgspec.Struct, kw_only=True):
    """What became of the frames of this run."""

    ok: int = 0
    reject: int = 0
    safe: int = 0
    late: int = 0  # of the safe ones: the deadline passed first
    unrecorded: int = 0  # of the safe ones: the journal could not be written


class Settlement:
    """Records verdicts and tells them on, at most one for each number; any thread may call."""

    def __init__(
        self,
        journal: Journal,
        rule: VerdictRule,
        *,
        clock: Clock,
        source: str,
        bundle: str,
        tell: Told,
        tell_event: Callable[[LineEvent], None],
        deadline_ms: float | None = None,
    ) -> None:
        self._journal = journal
        self._rule = rule
        self._clock = clock
        self._source = source
        self.bundle = bundle
        self._tell = tell
        self._tell_event = tell_event
        self._deadline_ms = deadline_ms
        self._open: dict[int, Frame] = {}
        self._newest = 0  # number that was expected
        self.hurry = threading.Event()  # a part came that has little time left
        self._lock = threading.RLock()
        self._disk_full = False
        self.counts = Counts()
        self.latency = LatencyHistogram()  # from the trigger until it is on disk, and told
        self.dropped = 0

    def expect(self, frame: Frame) -> None:
        """A part is on its way: it must be settled."""
        with self._lock:
            self._open[frame.number] = frame
            self._newest = max(self._newest, frame.number)
        left_ms, whole_ms = self.left_ms(frame), self._deadline_ms
        if left_ms is not None and whole_ms is not None and left_ms < whole_ms / LOOKS:
            self.hurry.set()

    @property
    def settled_through(self) -> int:
        """Up to this number every frame that was expected has its verdict, or was dropped."""
        with self._lock:
            return min(self._open, default=self._newest + 1) - 1

    def is_open(self, number: int) -> bool:
        """Whether the part still waits for its verdict."""
        with self._lock:
            return number in self._open

    def forget(self, number: int) -> None:
        """The policy dropped the frame: it needs no verdict."""
        with self._lock:
            self._open.pop(number, None)

    def settle(
        self,
        record: FrameRecord,
        pixels: "NDArray[np.uint8] | None" = None,
        embedding: "NDArray[np.float32] | None" = None,
    ) -> bool:
        """Record and tell a verdict; False where the part has one already."""
        with self._lock:
            if self._open.pop(record.number, None) is None:
                return False
            if not self._journal.append(record, otherwise=lambda: self._instead(record)):
                record = self._unrecorded(record)
            elif self._disk_full:
                self._disk_full = False
                self.event("disk", self._after_the_disk(), "info")
            self._count(record)
            self._tell(record, pixels, embedding)
            return True

    def settle_safe(self, frame: Frame, reason: str) -> bool:
        """The safe verdict for a part that could not be judged."""
        now_ns = self._clock.monotonic_ns()
        record = FrameRecord(
            number=frame.number,
            source=self._source,
            captured_at=frame.captured_at,
            captured_ns=frame.captured_ns,
            part_id=frame.name,
            verdict="safe",
            action=action_of("safe", self._rule),
            reason=reason,
            dropped=self.dropped,
            untimed=frame.untimed,
            bundle=self.bundle,
            latency=StageLatency(total_ms=(now_ns - frame.captured_ns) / 1e6),
        )
        return self.settle(record, frame.pixels)

    def left_ms(self, frame: Frame) -> float | None:
        """Until the part's deadline; None where there is none."""
        if self._deadline_ms is None:
            return None
        return self._deadline_ms - (self._clock.monotonic_ns() - frame.captured_ns) / 1e6

    def settle_hopeless(self, frame: Frame) -> None:
        """The safe verdict for a part that could not be judged before its deadline."""
        reason = f"could not be judged within {self._deadline_ms:g} ms any more"
        if self.settle_safe(frame, reason):
            self.counts.late += 1

    def settle_late(self) -> float | None:
        """Give every part whose deadline passed the safe verdict; seconds until the next one."""
        if self._deadline_ms is None:
            return None
        now_ns = self._clock.monotonic_ns()
        limit_ns = int(self._deadline_ms * 1e6)
        with self._lock:
            frames = sorted(self._open.values(), key=lambda frame: frame.captured_ns)
        for frame in frames:
            left_ns = frame.captured_ns + limit_ns - now_ns
            if left_ns > 0:
                return left_ns / 1e9
            if self.settle_safe(frame, f"no verdict within {self._deadline_ms:g} ms"):
                self.counts.late += 1
        return None

    def settle_open(self, reason: str) -> None:
        """Give every part that has no verdict yet the safe one."""
        with self._lock:
            frames = sorted(self._open.values(), key=lambda frame: frame.number)
        for frame in frames:
            self.settle_safe(frame, reason)

    def event(self, kind: str, text: str, severity: Severity) -> None:
        """Record and tell something that happened to the line."""
        event = LineEvent(kind=kind, text=text, severity=severity, at=self._clock.unix_s())
        self._journal.append(event)
        self._tell_event(event)

    def _after_the_disk(self) -> str:
        lost = self._journal.lost
        rest = f"{lost} entries were lost" if lost else "nothing was lost"
        return f"the journal can be written again; {rest}"

    def _unrecorded(self, record: FrameRecord) -> FrameRecord:
        """What cannot be recorded is not let through as good: the safe action holds."""
        self.counts.unrecorded += 1
        if not self._disk_full:
            self._disk_full = True
            why = self._journal.refusal
            self.event("disk", f"the journal refuses ({why}); the safe verdict holds", "alarm")
        return self._instead(record)

    def _instead(self, record: FrameRecord) -> FrameRecord:
        """What is told of a part whose verdict is not on disk; a reject stays one."""
        rejected = record.action == "reject"
        return msgspec.structs.replace(
            record,
            verdict="safe",
            action="reject" if rejected else action_of("safe", self._rule),
            reason=f"not recorded on disk ({record.verdict} by the model)",
        )

    def _count(self, record: FrameRecord) -> None:
        setattr(self.counts, record.verdict, getattr(self.counts, record.verdict) + 1)
        if not record.untimed:  # of which nobody knows when it came
            self.latency.add((self._clock.monotonic_ns() - record.captured_ns) / 1e6)
