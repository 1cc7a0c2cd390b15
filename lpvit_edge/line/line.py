"""The line put together: a feed, the judge, who is told, and who watches over them."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import MissingDependencyError
from lpvit_edge.golden import unpack
from lpvit_edge.line.clock import Clock, SystemClock
from lpvit_edge.line.config import LineConfig
from lpvit_edge.line.feed import Intake
from lpvit_edge.line.feeds import open_feed, source_name
from lpvit_edge.line.folder import FolderFeed
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.guarded import GuardedThread, ThreadWatch
from lpvit_edge.line.health import Status
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.judge import Judge, Summary
from lpvit_edge.line.left_open import go_on, note_settled
from lpvit_edge.line.outputs import Outputs
from lpvit_edge.line.policy import FrameQueue
from lpvit_edge.line.records import TelemetryHub
from lpvit_edge.line.sequence import SequenceFile
from lpvit_edge.line.settle import LOOKS, Settlement
from lpvit_edge.line.sink_watch import LineWatch, SinkWatch
from lpvit_edge.line.sinks import open_sinks
from lpvit_edge.line.swap import Swap
from lpvit_edge.line.verdict import refuse_unknown_labels
from lpvit_edge.proof import refuse_disagreement

if TYPE_CHECKING:
    from lpvit_engines import Engine

_WATCH_S, _CHECKPOINT_S = 0.2, 2.0
PROBE_S = 1.0  # a golden frame passes where no part came for so long


class Line:
    """One line, from start() to stop(). Its own loop runs in the thread that calls run()."""

    def __init__(
        self,
        bundle: Bundle,
        config: LineConfig,
        *,
        clock: Clock | None = None,
        load: "Callable[[], Engine] | None" = None,
        hub: TelemetryHub | None = None,
    ) -> None:
        """Open state and sinks. Raises UnknownOptionError, SinkError, MissingDependencyError."""
        refuse_unknown_labels(config.verdict, bundle.labels)
        self.config = config
        self.bundle = bundle
        self.clock = clock or SystemClock()
        state = Path(config.state)
        self.sequence = SequenceFile(state / "sequence")
        self.journal = Journal(state / "journal.sqlite")
        self.outputs = Outputs(self.journal)
        self.outputs.hub = hub
        self.source = source_name(config.source)
        self.settlement = Settlement(
            self.journal,
            config.verdict,
            clock=self.clock,
            source=self.source,
            bundle=bundle.version,
            tell=self.outputs.tell,
            tell_event=self.outputs.tell_event,
            deadline_ms=config.policy.deadline_ms,
        )
        self.swap = Swap(config, self.settlement.event)
        self.queue = FrameQueue(
            config.policy, on_drop=lambda frame: self.settlement.forget(frame.number)
        )
        self.intake = Intake(self.queue, self.settlement, self.clock)
        self.feed = open_feed(config, self.intake, self.sequence, self.journal)
        self.judge = Judge(
            bundle,
            load or (lambda: self.swap.load(bundle)),
            self.queue,
            self.settlement,
            config.verdict,
            source=self.source,
            clock=self.clock,
        )
        self.outputs.sinks = open_sinks(config.sink, self.journal)
        self.outputs.hold("the line starts")
        self._feed_stops = threading.Thread(target=self._stop_feed, name="stop", daemon=True)
        self._ended = threading.Event()  # after the drain: until then parts have deadlines
        self._watch = LineWatch(self.settlement, self.queue, self.feed, self.journal, self.clock)
        self.threads = ThreadWatch(
            self._needed_threads, hold=self.outputs.hold, event=self.settlement.event
        )
        self._deadlines = GuardedThread(self._watch_deadlines, name="deadlines")
        look = self.threads.look
        self._hold = GuardedThread(self._watch_hold, name="hold", failed=lambda text: look())
        self._sinks = GuardedThread(self._watch_sinks, name="sinks", failed=lambda text: look())
        self._golden = unpack(bundle.path("golden.zip"))

    def start(self) -> None:
        """Warm the engine up on the golden frames, settle what a crash left, and begin.

        Raises MismatchError where the golden frames get other answers than when they were built.
        """
        found = self.judge.warm_up(self._golden)
        refuse_disagreement(found)
        self._settle_left_open()
        for thread in (self._deadlines, self._hold, self._sinks):
            thread.start()
        self.feed.start()

    def _settle_left_open(self) -> None:
        """Frames that were taken before a crash and have no verdict."""
        claimed = self.feed.claimed_numbers() if isinstance(self.feed, FolderFeed) else frozenset()
        parts = self.config.policy.kind == "triggered"
        go_on(
            self.sequence, self.journal, self.settlement, self.clock, claimed=claimed, parts=parts
        )

    def step(self, timeout_s: float = 0.2) -> bool:
        """Judge one frame, or look after things; False when there is nothing left to do."""
        self._take_over()
        frame = self._judge_next(timeout_s)
        if frame is None and self.queue.is_drained:
            return False
        if frame is None or frame.pixels is None:  # nothing for the engine
            self._look_after()
        return True

    def _judge_next(self, timeout_s: float) -> Frame | None:
        if (frame := self.judge.step(timeout_s)) is not None:
            self.feed.settled(frame)
        return frame

    def _take_over(self) -> None:
        """Between two frames: go on with a bundle that was offered and proven meanwhile."""
        ready = self.swap.take()
        if ready is None:
            return
        bundle = ready.bundle
        before = self.judge.use(bundle, ready.engine, lambda: self.swap.load(bundle))
        self.bundle, self.settlement.bundle, self._golden = bundle, bundle.version, ready.golden
        ready.show()
        self.settlement.event("bundle", f"{bundle.version} took over: {ready.why}", "warning")
        self.swap.took(ready, before)

    def _look_after(self) -> None:
        self.journal.flush()
        passed_ns = self.judge.passed_ns
        if self._golden and (passed_ns is None or self._since_s(passed_ns) > PROBE_S):
            self.judge.probe(self._golden[0])

    def _watch_sinks(self) -> None:
        """Tell, in a thread of its own, what becomes of sinks and parts: it may wait for a disk."""
        sinks = SinkWatch(self.outputs, self.settlement.event, self.clock)
        tidied_s = 0.0
        while not self._ended.is_set():
            self.threads.look()
            sinks.look()
            begun = self.judge.passed_ns is not None
            self._watch.look(engine_silent=begun and not self.engine_answers())
            note_settled(self.journal, self.settlement.settled_through)
            if (now_s := self.clock.monotonic_ns() / 1e9) - tidied_s > _CHECKPOINT_S:
                self.journal.checkpoint()
                tidied_s = now_s
            self.clock.wait(self._ended, _WATCH_S)

    def _watch_hold(self) -> None:
        """Take the safe position while no part can be judged, waiting for no engine or disk."""
        while not self._ended.is_set():
            self.outputs.hold(self._blindness())
            self.clock.wait(self._ended, _WATCH_S)

    def _needed_threads(self) -> tuple[GuardedThread, ...]:
        sinks = (sink.thread for sink in self.outputs.sinks)
        return (self._deadlines, self._hold, self._sinks, self.feed.thread, *sinks)

    def _blindness(self) -> str | None:
        """Why no part can be judged now, None while parts can."""
        if died := self.threads.died():
            return f"the thread {', '.join(died)} ended"
        if self.feed.health.state not in ("live", "ended"):
            return f"source {self.feed.health.state}: {self.feed.health.text}"
        return None if self.engine_answers() else "the engine does not answer"

    def run(self, *, each: Callable[[], None] = lambda: None) -> None:
        """Judge until stop() or the end of the source; `each` is called between frames.

        Raises MissingDependencyError where the source needs a library that is not there.
        """
        while self.step():
            each()
        if self.feed.health.fatal:
            raise MissingDependencyError(self.feed.health.fatal)

    def request_stop(self) -> None:
        """Take no more frames; run() returns when those in the queue have their verdicts."""
        with contextlib.suppress(RuntimeError):  # it was asked for before
            self._feed_stops.start()

    def _stop_feed(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has not started
            self.feed.stop()

    def close(self, *, timeout_s: float = 5.0) -> dict[str, int]:
        """End everything; entries that each sink has not delivered, which stay in the journal."""
        self.request_stop()
        try:
            while self._feed_stops.is_alive():  # it may wait for room in the queue
                self._judge_next(0.02)
            while self._judge_next(0.0) is not None:
                pass
        finally:  # what nobody expected may end it here once more
            left = self._end(timeout_s)
        return left

    def _end(self, timeout_s: float) -> dict[str, int]:
        self.queue.close()
        self._feed_stops.join()
        self._ended.set()
        self.settlement.hurry.set()  # who waits for it sees the end
        for thread in (self._hold, self._sinks, self._deadlines):
            if thread.is_alive():
                thread.join()
        self.settlement.settle_open("the line stopped")  # what an error tore from the judge
        self.outputs.hold("the line stopped")
        # A feed that died left numbers behind that nobody was told of: the next start looks there.
        is_whole = self.feed.thread.failure is None
        through = self.sequence.taken if is_whole else self.settlement.settled_through
        note_settled(self.journal, through)
        left = self.outputs.close(timeout_s)
        self.judge.close()
        self.swap.close()
        self.journal.close()
        if self.journal.waiting:
            left["journal"] = self.journal.waiting
        self.sequence.close()
        return left

    def _watch_deadlines(self) -> None:
        if self.config.policy.deadline_ms is None:
            return
        period_s = self.config.policy.deadline_ms / 1000
        while not self._ended.is_set():
            self.settlement.hurry.clear()
            next_s = self.settlement.settle_late()
            look_s = period_s / LOOKS
            self.settlement.hurry.wait(look_s if next_s is None else min(next_s, look_s))

    def _since_s(self, then_ns: int) -> float:
        return (self.clock.monotonic_ns() - then_ns) / 1e9

    def engine_answers(self) -> bool:
        """Whether a frame, or a golden frame, passed the engine not long ago."""
        passed_ns = self.judge.passed_ns
        return passed_ns is not None and self._since_s(passed_ns) < 5.0

    @property
    def dropped(self) -> int:
        """Frames that gave way to newer ones, in the capture process or here."""
        return self.queue.dropped + self.feed.health.dropped

    def status(self) -> Status:
        """For /healthz and /readyz."""
        counts, health = self.settlement.counts, self.feed.health
        return Status(
            engine=self.engine_answers(),
            source=health.state == "live",
            alive=not self.threads.died(),
            text=f"source {health.state} {health.text}".strip(),
            frames=counts.ok + counts.reject + counts.safe,
            safe=counts.safe,
            dropped=self.dropped,
            waiting_on_disk=self.journal.waiting,
            sinks=self.outputs.faults(),
            missed=self.outputs.missed(),
            died=self.threads.aside | self.threads.died(),
        )

    def summary(self) -> Summary:
        """What this run did so far."""
        counts, latency = self.settlement.counts, self.settlement.latency
        return Summary(
            frames=counts.ok + counts.reject + counts.safe,
            ok=counts.ok,
            reject=counts.reject,
            safe=counts.safe,
            late=counts.late,
            dropped=self.dropped,
            overflowed=self.queue.overflowed,
            capture_restarts=self.feed.health.restarts,
            p50_ms=latency.percentile_ms(50),
            p99_ms=latency.percentile_ms(99),
            p999_ms=latency.percentile_ms(99.9),
            largest_ms=latency.largest_ms,
        )
