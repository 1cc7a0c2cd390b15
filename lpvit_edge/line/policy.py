"""What happens when frames come faster than they can be judged.

* newest     a live view: the frame that waits is replaced by a newer one; drops are counted.
* wait       a file or a folder: a bounded queue; the source is slowed down, nothing is dropped.
* triggered  inspection: each frame is a part, and a part is never dropped. Where the queue is full,
             the part goes on without its image and gets the safe verdict at once.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec

from lpvit_edge.line.frames import Frame

PolicyName = Literal["newest", "wait", "triggered"]
OVERFLOW = "queue full"


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The [policy] table of line.toml."""

    kind: PolicyName | None = None  # None: `wait` for a folder or a video file, else `newest`
    queue: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 8  # frames; of `newest` always 1
    deadline_ms: Annotated[float, msgspec.Meta(gt=0)] | None = None  # trigger to verdict


class FrameQueue:
    """Between the source's thread and the judge's; put() and take() may be called from any."""

    def __init__(
        self, policy: Policy, *, on_drop: Callable[[Frame], None] = lambda frame: None
    ) -> None:
        self._policy = policy  # its kind None is `newest`
        self._on_drop = on_drop
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0
        self.overflowed = 0

    def put(self, frame: Frame) -> Frame | None:
        """Hand a frame over as the policy says; `wait` blocks. What was kept of it.

        None once the queue is closed.
        """
        with self._changed:
            kept = None if self._closed else self._add(frame)
            self._changed.notify_all()
            return kept

    def _add(self, frame: Frame) -> Frame | None:
        if self._policy.kind in ("newest", None):
            self._drop_waiting()
        elif self._policy.kind == "wait":
            self._changed.wait_for(lambda: self._closed or not self._is_full())
            if self._closed:
                return None
        elif self._is_full() and frame.pixels is not None:
            frame = msgspec.structs.replace(frame, pixels=None, lost=OVERFLOW)
        self.overflowed += frame.lost == OVERFLOW  # here, or before it left the capture process
        self._frames.append(frame)
        return frame

    def _is_full(self) -> bool:
        return sum(frame.pixels is not None for frame in self._frames) >= self._policy.queue

    def _drop_waiting(self) -> None:
        kept: deque[Frame] = deque()
        for frame in self._frames:
            if frame.pixels is None:
                kept.append(frame)
            else:
                self.dropped += 1
                self._on_drop(frame)
        self._frames = kept

    def take(self, timeout_s: float) -> Frame | None:
        """The oldest frame; None after the timeout, or when closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._frames or self._closed, timeout_s)
            if not self._frames:
                return None
            frame = self._frames.popleft()
            self._changed.notify_all()
            return frame

    def close(self) -> None:
        """Accept no more; what waits can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def is_drained(self) -> bool:
        """Whether it is closed and empty."""
        with self._changed:
            return self._closed and not self._frames
