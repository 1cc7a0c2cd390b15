"""Images of rejected and doubtful parts, with an index, in a ring of so many GB and days.

evidence/index.sqlite             number, time, label, confidence, verdict, reason, file
evidence/2026-03-01/000042.png    lossless, as the camera gave it
"""

import queue
import sqlite3
import time
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge.errors import FileFormatError
from lpvit_edge.files import write_atomic
from lpvit_edge.line.guarded import GuardedThread
from lpvit_edge.line.records import FrameRecord
from lpvit_edge.line.sink_config import EvidenceSink

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TABLE = """
CREATE TABLE IF NOT EXISTS images(
  number INTEGER PRIMARY KEY, captured_at REAL NOT NULL, source TEXT NOT NULL, part_id TEXT,
  verdict TEXT NOT NULL, label TEXT, confidence REAL, reason TEXT, bundle TEXT NOT NULL,
  file TEXT NOT NULL, bytes INTEGER NOT NULL)
"""
_INSERT = "INSERT OR REPLACE INTO images VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_WAITING = 64  # images; encoding is slower than judging


class EvidenceStore:
    """Writes in a thread of its own; where it cannot keep up, images are left out and counted."""

    def __init__(self, config: EvidenceSink) -> None:
        self.name = f"evidence {config.target}"
        self._config = config
        self._folder = Path(config.target)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / "index.sqlite"
        try:
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _TABLE)
        except sqlite3.DatabaseError as error:
            raise FileFormatError(f"{path}: cannot be opened ({error}); move it away") from error
        self._queue: queue.Queue[tuple[FrameRecord, NDArray[np.uint8]] | None] = queue.Queue(
            _WAITING
        )
        self.missed = 0
        self.error: str | None = None
        self.thread = GuardedThread(self._run, name=self.name)
        self.thread.start()

    def deliver(self, record: FrameRecord, pixels: "NDArray[np.uint8] | None") -> None:
        """Keep the image of a part that was rejected, not judged, or accepted with doubt."""
        doubtful = record.confidence is None or record.confidence < self._config.below
        if pixels is None or (record.verdict == "ok" and not doubtful):
            return
        try:
            self._queue.put_nowait((record, pixels))
        except queue.Full:
            self.missed += 1

    def hold(self, is_held: bool) -> None:
        """A folder has no safe position."""

    def close(self, timeout_s: float) -> int:
        """Write what waits."""
        left = 0
        try:
            self._queue.put(None, timeout=timeout_s)
            self.thread.join(timeout_s)
        except queue.Full:
            left = self._queue.qsize()
        if not self.thread.is_alive():
            self._db.close()
        return left

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._keep(*item)
                self._make_room()
                self.error = None
            # The disk, the index, or one image that is no picture: the next may be kept.
            except (OSError, sqlite3.Error, ValueError, TypeError) as error:
                self.missed += 1
                self.error = f"{self.name}: {error}"

    def _keep(self, record: FrameRecord, pixels: "NDArray[np.uint8]") -> None:
        from PIL import Image

        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        content = buffer.getvalue()
        day = datetime.fromtimestamp(record.captured_at, tz=timezone.utc).strftime("%Y-%m-%d")
        file = f"{day}/{record.number:06d}.png"
        write_atomic(self._folder / file, content)
        row = (
            record.number, record.captured_at, record.source, record.part_id, record.verdict,
            record.label, record.confidence, record.reason, record.bundle, file, len(content),
        )  # fmt: skip
        self._db.execute(_INSERT, row)

    def _make_room(self) -> None:
        """Remove the oldest images until the store keeps its bounds."""
        oldest = time.time() - self._config.max_days * 86400
        for number, file in self._db.execute(
            "SELECT number, file FROM images WHERE captured_at < ? ORDER BY number", (oldest,)
        ).fetchall():
            self._remove(number, file)
        while self.stored_bytes() > self._config.max_gb * 1e9:
            number, file = self._db.execute(
                "SELECT number, file FROM images ORDER BY number LIMIT 1"
            ).fetchone()
            self._remove(number, file)

    def _remove(self, number: int, file: str) -> None:
        (self._folder / file).unlink(missing_ok=True)
        self._db.execute("DELETE FROM images WHERE number = ?", (number,))

    def stored_bytes(self) -> int:
        """Bytes of all images kept."""
        row = self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM images").fetchone()
        return int(row[0])
