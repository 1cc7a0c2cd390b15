"""Images of rejected and doubtful parts, with an index, in a ring of so many GB and days.

evidence/index.sqlite             number, time, label, confidence, verdict, reason, file
evidence/2026-03-01/000042.png    lossless, as the camera gave it
"""

import contextlib
import queue
import sqlite3
import threading
from datetime import datetime, timezone
from io import BytesIO
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.line.clock import Clock, SystemClock
from lpvit_edge.line.guarded import GuardedThread
from lpvit_edge.line.records import FrameRecord
from lpvit_edge.line.sink_config import EvidenceSink
from lpvit_edge.line.sinks.evidence_index import EvidenceIndex

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_WAITING = 64  # images; encoding is slower than judging
_MOST_BYTES = 256 << 20  # of them
_AGAIN_S, _LONGEST_WAIT_S = 1.0, 30.0  # between two attempts while the disk refuses


class _Work(msgspec.Struct, frozen=True, kw_only=True):
    """The line runs on that day; with a record, its image is to be kept."""

    day: str
    record: FrameRecord | None = None
    pixels: "NDArray[np.uint8] | None" = None

    @property
    def size(self) -> int:
        """Bytes of the image; 0 without one."""
        return 0 if self.pixels is None else self.pixels.nbytes


class EvidenceStore:
    """Writes in a thread of its own; where it cannot keep up, images are left out and counted.

    While the folder cannot be written the images that have room wait in memory, and it is tried
    again, ever less often.
    """

    def __init__(self, config: EvidenceSink, clock: Clock | None = None) -> None:
        self.name = f"evidence {config.target}"
        self._config = config
        self._index: EvidenceIndex | None = None
        self._noted = ""  # the day that the index knows to be today
        self._unwritten = 0  # images in the thread's hands
        self._lock = threading.Lock()
        self._waiting_bytes = 0  # of images in the queue and in the thread's hands
        self._give_up = threading.Event()
        self._queue: queue.Queue[_Work | None] = queue.Queue(_WAITING)
        self.missed = 0
        self.error: str | None = None
        self._clock = clock or SystemClock()
        self._day = _day(self._clock.unix_s())
        self._queue.put(_Work(day=self._day))  # opens it, before the first image
        self.thread = GuardedThread(self._run, name=self.name)
        self.thread.start()

    def deliver(self, record: FrameRecord, pixels: "NDArray[np.uint8] | None") -> None:
        """Keep the image of a part that was rejected, not judged, or accepted with doubt."""
        day = _day(self._clock.unix_s())
        doubtful = record.confidence is None or record.confidence < self._config.below
        is_kept = pixels is not None and (record.verdict != "ok" or doubtful)
        if not is_kept and day == self._day:
            return
        work = _Work(day=day, record=record, pixels=pixels) if is_kept else _Work(day=day)
        with self._lock:
            waiting = self._waiting_bytes
            if self._queue.full() or (waiting and waiting + work.size > _MOST_BYTES):
                self.missed += is_kept
                return
            self._waiting_bytes += work.size
            self._queue.put_nowait(work)  # whoever puts holds the lock
            self._day = day

    def hold(self, is_held: bool) -> None:
        """A folder has no safe position."""

    def close(self, timeout_s: float) -> int:
        """Write what waits; images that could not be written."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_s)
            self.thread.join(timeout_s)
        self._give_up.set()
        self.thread.join(2.0)
        with self._queue.mutex:
            waiting: list[_Work | None] = list(self._queue.queue)
        return self._unwritten + sum(work is not None and work.size > 0 for work in waiting)

    def _run(self) -> None:
        while not self._give_up.is_set() and (work := self._queue.get()) is not None:
            self._unwritten = int(work.size > 0)
            wait_s = _AGAIN_S
            while not self._is_done(work):
                if self._give_up.wait(wait_s):
                    return
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            self._unwritten = 0
            with self._lock:
                self._waiting_bytes -= work.size
        self._close_index()

    def _is_done(self, work: _Work) -> bool:
        """Whether that needs not be tried again."""
        try:
            index = self._index = self._index or EvidenceIndex(self._config)
            if work.day != self._noted:
                index.note_day(work.day)
                self._noted = work.day
            if work.record is not None and work.pixels is not None:
                index.keep(work.record, work.day, _png(work.pixels))
        except (OSError, sqlite3.Error) as error:  # the disk, or the index
            self.error = f"{self.name}: {_in_words(error)}"
            self._close_index()
            return False
        except (ValueError, TypeError) as error:  # an image that is no picture
            self.missed += 1
            self.error = f"{self.name}: {error}"
            return True
        self.error = None
        return True

    def _close_index(self) -> None:
        if self._index is not None:
            self._index.close()
            self._index = None
            self._noted = ""


def _in_words(error: OSError | sqlite3.Error) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, sqlite3.OperationalError):
        return f"index.sqlite: {error}"
    return f"index.sqlite: {error}; move it away, a new one takes in the images that are there"


def _png(pixels: "NDArray[np.uint8]") -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _day(unix_s: float) -> str:
    """The date in UTC."""
    return datetime.fromtimestamp(unix_s, tz=timezone.utc).strftime("%Y-%m-%d")
