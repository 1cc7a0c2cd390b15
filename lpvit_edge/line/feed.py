"""What brings numbered frames to the judge, each feed in a thread of its own."""

from typing import Literal, Protocol

import msgspec

from lpvit_edge.line.clock import Clock
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.guarded import GuardedThread
from lpvit_edge.line.policy import FrameQueue
from lpvit_edge.line.settle import Settlement

State = Literal["starting", "live", "lost", "ended"]


class Health(msgspec.Struct, kw_only=True):
    """How the source is. `since_ns` is CLOCK_MONOTONIC."""

    state: State = "starting"
    text: str = ""
    since_ns: int = 0
    process: int | None = None  # of the capture process
    restarts: int = 0
    dropped: int = 0  # in the capture process
    fatal: str | None = None  # what no restart can mend


class Feed(Protocol):
    """A source of numbered frames."""

    health: Health
    thread: GuardedThread

    def start(self) -> None:
        """Begin."""
        ...

    def stop(self) -> None:
        """Take no more frames; returns when the last one is in the queue."""
        ...

    def settled(self, frame: Frame) -> None:
        """A frame has its verdict."""
        ...


class Intake:
    """Where a feed hands its frames in: each is expected to be settled from then on."""

    def __init__(self, queue: FrameQueue, settlement: Settlement, clock: Clock) -> None:
        self.queue = queue
        self.settlement = settlement
        self.clock = clock

    def accept(self, frame: Frame, *, comes_again: bool = False) -> None:
        """Expect a verdict, and queue the frame as the policy says.

        A part that cannot be judged, or for whose image there is no room, gets the safe verdict at
        once; a frame that comes too late for a stopping line does too, unless it `comes_again`
        with the next start.
        """
        self.settlement.expect(frame)
        kept = self.queue.put(frame)
        if kept is not None and kept.pixels is None:
            self.settlement.settle_safe(kept, kept.lost or "lost")
        elif kept is None and comes_again:
            self.settlement.forget(frame.number)
        elif kept is None:
            self.settlement.settle_safe(frame, "the line was stopping")
        self.settlement.dropped = self.queue.dropped
