"""Sinks that fail, and counts of what went wrong, as events in the journal."""

from collections.abc import Callable

from lpvit_edge.line.clock import Clock, JumpWatch
from lpvit_edge.line.feed import Feed
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.outputs import Outputs
from lpvit_edge.line.policy import FrameQueue
from lpvit_edge.line.records import Severity
from lpvit_edge.line.settle import Settlement

_REST_S = 10.0  # between two events about one count
_LOST = "{n} entries are lost, since the disk refused them for too long"
_REPEATED = (
    "{n} verdicts have a number that has one already, and are not recorded; was the state folder "
    "changed while the line ran? Start it anew"
)
_SILENT = "the engine gives no answer; the outputs are held"
_AGAIN = "the engine answers; the outputs are not held for it any more"


class CountWatch:
    """Says how much a count has risen, with a rest after each time."""

    def __init__(self, event: Callable[[str, str, Severity], None], clock: Clock) -> None:
        self._event = event
        self._clock = clock
        self._told: dict[str, tuple[int, int | None]] = {}  # count, time

    def look(
        self, kind: str, count: int, what: str, severity: Severity, *, name: str | None = None
    ) -> None:
        """An event of `kind` where the count rose since the last one, and that was long ago.

        `what` says so, with {n} for how much it rose.
        """
        key = name or kind
        now_ns = self._clock.monotonic_ns()
        before, told_ns = self._told.get(key, (0, None))
        if count <= before or (told_ns is not None and now_ns - told_ns < _REST_S * 1e9):
            return
        self._told[key] = count, now_ns
        prefix = "" if name is None else f"{name}: "
        self._event(kind, prefix + what.format(n=count - before), severity)


class SinkWatch:
    """Looked through a few times a second; says each change once."""

    def __init__(
        self, outputs: Outputs, event: Callable[[str, str, Severity], None], clock: Clock
    ) -> None:
        self._outputs = outputs
        self._event = event
        self._failing: set[str] = set()
        self._missed = CountWatch(event, clock)

    def look(self) -> None:
        """Tell what changed since the last call."""
        faults = self._outputs.faults()
        for name in faults.keys() - self._failing:
            self._event("sink", f"{faults[name]}; it is tried again", "warning")
        for name in self._failing - faults.keys():
            self._event("sink", f"{name}: takes verdicts again", "info")
        self._failing = set(faults)
        for name, missed in self._outputs.missed().items():
            if name == "journal":
                self._missed.look("disk", missed, _LOST, "alarm", name=name)
            else:
                self._missed.look("sink", missed, "missed {n} verdicts", "alarm", name=name)


class LineWatch:
    """What the line could not do for its parts, and what else happened to it."""

    def __init__(
        self, settlement: Settlement, queue: FrameQueue, feed: Feed, journal: Journal, clock: Clock
    ) -> None:
        self._settlement = settlement
        self._queue = queue
        self._feed = feed
        self._journal = journal
        self._losses = CountWatch(settlement.event, clock)
        self._jumps = JumpWatch(clock)
        self._silent = False  # the engine, and that was told

    def look(self, *, engine_silent: bool) -> None:
        """Tell what changed since the last call."""
        look = self._losses.look
        late, overflowed = self._settlement.counts.late, self._queue.overflowed
        look("late", late, "{n} parts had no verdict in time", "alarm")
        look("overflow", overflowed, "{n} parts found the queue full", "alarm")
        dropped = self._queue.dropped + self._feed.health.dropped
        look("dropped", dropped, "{n} frames gave way to newer ones", "info")
        look("gap", self._journal.repeated, _REPEATED, "alarm")
        event = self._settlement.event
        if engine_silent != self._silent:
            self._silent = engine_silent
            event("engine", _SILENT, "alarm") if engine_silent else event("engine", _AGAIN, "info")
        if (jump_s := self._jumps.jumped_s()) is not None:
            text = f"the time of day jumped by {jump_s:+.1f} s; durations are unaffected"
            event("clock", text, "warning")
