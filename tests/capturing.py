"""A capture process without a line: what it hands over, and what it tells."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lpvit_edge.line.capture import CaptureFeed
from lpvit_edge.line.clock import SystemClock
from lpvit_edge.line.config import SourceConfig
from lpvit_edge.line.feed import Intake
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.policy import FrameQueue, Policy, PolicyName

ROOT = Path(__file__).parent.parent


class Told:
    """Stands where the line's settlement stands: keeps what it is told."""

    def __init__(self) -> None:
        self.expected: list[int] = []
        self.events: list[tuple[str, str, str]] = []
        self.dropped = 0

    def expect(self, frame: Frame) -> None:
        self.expected.append(frame.number)

    def settle_safe(self, frame: Frame, reason: str) -> bool:
        return True  # the queue was closed at the end of the test

    def event(self, kind: str, text: str, severity: str) -> None:
        self.events.append((kind, text, severity))

    def texts(self, kind: str) -> list[str]:
        return [text for one, text, _ in self.events if one == kind]


class Capturing:
    """A feed, its queue, and what it told."""

    def __init__(self, feed: CaptureFeed, queue: FrameQueue, told: Told) -> None:
        self.feed, self.queue, self.told = feed, queue, told

    def frames(self, count: int, *, seconds: float = 30.0) -> list[Frame]:
        """The next frames."""
        found: list[Frame] = []
        end_s = time.monotonic() + seconds
        while len(found) < count:
            assert time.monotonic() < end_s, (len(found), self.feed.health, self.told.events)
            if (frame := self.queue.take(0.05)) is not None:
                found.append(frame)
        return found

    def rest(self, *, seconds: float = 30.0) -> list[Frame]:
        """All frames until the source has ended."""
        found: list[Frame] = []
        end_s = time.monotonic() + seconds
        while not self.queue.is_drained:
            assert time.monotonic() < end_s, (len(found), self.feed.health, self.told.events)
            if (frame := self.queue.take(0.05)) is not None:
                found.append(frame)
        return found

    def until(self, condition: Callable[[], bool], *, seconds: float = 30.0) -> None:
        """Wait, and let nobody wait for room in the queue meanwhile."""
        end_s = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end_s, (self.feed.health, self.told.events)
            self.queue.take(0.02)


@contextmanager
def capturing(
    source: SourceConfig,
    folder: Path,
    *,
    policy: PolicyName = "wait",
    stall_s: float = 5.0,
) -> Iterator[Capturing]:
    """Run a capture process for a source; it is killed at the end."""
    told: Any = Told()
    rule = Policy(kind=policy, queue=64)
    queue = FrameQueue(rule)
    intake = Intake(queue, told, SystemClock())
    feed = CaptureFeed(source, rule, intake, folder / "sequence", stall_s=stall_s)
    feed.start()
    try:
        yield Capturing(feed, queue, told)
    finally:
        queue.close()
        feed.stop()


def levels(frames: list[Frame]) -> list[int]:
    """Mean grey level of each frame that has pixels."""
    return [round(float(np.mean(f.pixels))) for f in frames if f.pixels is not None]


def process_exists(number: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def path_with(*folders: Path) -> str:
    """PYTHONPATH of a capture process that sees these folders too."""
    found = [str(folder) for folder in folders]
    return os.pathsep.join([*found, *filter(None, [os.environ.get("PYTHONPATH")])])
