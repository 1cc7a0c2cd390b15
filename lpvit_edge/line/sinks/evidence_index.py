"""The folder of evidence and its index, in step with each other, within so many GB and days.

A day counts when the line ran on it. No clock is believed: a time of day that jumps ten years ahead
and back makes two days of it, and not an empty store.
"""

import contextlib
import errno
import math
import shutil
import sqlite3
from collections.abc import Iterable
from pathlib import Path

from lpvit_edge.files import write_atomic
from lpvit_edge.line.records import FrameRecord
from lpvit_edge.line.sink_config import EvidenceSink

_TABLES = """
PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;
CREATE TABLE IF NOT EXISTS images(
  number INTEGER PRIMARY KEY, captured_at REAL NOT NULL, source TEXT NOT NULL, part_id TEXT,
  verdict TEXT NOT NULL, label TEXT, confidence REAL, reason TEXT, bundle TEXT NOT NULL,
  file TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS days(place INTEGER PRIMARY KEY AUTOINCREMENT, day TEXT UNIQUE);
"""
_INSERT = "INSERT OR REPLACE INTO images VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# Of days that the line ran on, the newest last; an image belongs to the day in its file's name.
_OUTLIVED = """
SELECT number, file, bytes FROM images WHERE substr(file, 1, 10) IN
  (SELECT day FROM days ORDER BY place DESC LIMIT -1 OFFSET ?)
"""


class EvidenceIndex:
    """Open, one thread uses it. Each call raises OSError or sqlite3.Error; then open it anew."""

    def __init__(self, config: EvidenceSink) -> None:
        """Open or make it, and take in what a crash or a power cut left between file and index."""
        self._config = config
        self._folder = Path(config.target)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / "index.sqlite"
        self._db = sqlite3.connect(self._path, check_same_thread=False, isolation_level=None)
        try:
            self._db.executescript(_TABLES)
            self._inode = self._path.stat().st_ino
            self._sweep()
            self._db.execute(
                "INSERT OR IGNORE INTO days(day) SELECT substr(file, 1, 10) FROM images "
                "GROUP BY 1 ORDER BY MAX(number)"
            )
            row = self._db.execute("SELECT COALESCE(SUM(bytes), 0) FROM images").fetchone()
            self.stored_bytes = int(row[0])
        except (OSError, sqlite3.Error):
            self._db.close()
            raise

    def note_day(self, day: str) -> None:
        """The line runs on that day, 2026-03-01; what it outlived is removed."""
        self._refuse_another_disk()
        self._db.execute("INSERT OR REPLACE INTO days(day) VALUES(?)", (day,))
        kept_days = 1 + math.ceil(self._config.max_days)  # today's is not over
        self._remove(self._db.execute(_OUTLIVED, (kept_days,)).fetchall())

    def keep(self, record: FrameRecord, day: str, content: bytes) -> None:
        """Write an image and its entry, and remove the oldest beyond `max_gb`."""
        self._refuse_another_disk()
        self._refuse_full_disk(len(content))
        file = f"{day}/{record.number:06d}.png"
        self._forget_namesake(record.number)
        write_atomic(self._folder / file, content)
        row = (
            record.number, record.captured_at, record.source, record.part_id, record.verdict,
            record.label, record.confidence, record.reason, record.bundle, file, len(content),
        )  # fmt: skip
        self._db.execute(_INSERT, row)
        self.stored_bytes += len(content)
        while self.stored_bytes > self._config.max_gb * 1e9:
            self._remove(
                self._db.execute(
                    "SELECT number, file, bytes FROM images ORDER BY number LIMIT 1"
                ).fetchall()
            )

    def close(self) -> None:
        """Close the index."""
        self._db.close()

    def _remove(self, rows: Iterable[tuple[int, str, int]]) -> None:
        for number, file, size in rows:
            (self._folder / file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still in it
                (self._folder / file).parent.rmdir()
            self._db.execute("DELETE FROM images WHERE number = ?", (number,))
            self.stored_bytes -= size

    def _forget_namesake(self, number: int) -> None:
        """Numbers begin anew with another state folder; the older image of that number goes."""
        self._remove(
            self._db.execute(
                "SELECT number, file, bytes FROM images WHERE number = ?", (number,)
            ).fetchall()
        )

    def _refuse_another_disk(self) -> None:
        """SQLite goes on writing to a file that was removed, or whose disk was unmounted."""
        if self._path.stat().st_ino != self._inode:
            raise OSError(errno.ESTALE, "the index was replaced by another file")

    def _refuse_full_disk(self, size: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if free - size < self._config.min_free_gb * 1e9:
            raise OSError(
                errno.ENOSPC,
                f"{free / 1e9:.2f} GB are free and min_free_gb = {self._config.min_free_gb:g}: the "
                "journal needs room; lower max_gb, or free some",
            )

    def _sweep(self) -> None:
        """Bring files and entries together where one was written without the other."""
        known = {file for (file,) in self._db.execute("SELECT file FROM images")}
        found = set()
        for path in self._folder.glob("[0-9]*-[0-9]*-[0-9]*/*.png"):
            file = str(path.relative_to(self._folder))
            found.add(file)
            if path.name.startswith("."):  # half a file, of a process that was killed
                path.unlink(missing_ok=True)
            elif file not in known and path.stem.isdecimal():
                self._adopt(path, file)
        lost = [(file,) for file in known - found]
        self._db.executemany("DELETE FROM images WHERE file = ?", lost)

    def _adopt(self, path: Path, file: str) -> None:
        """An image without an entry: the journal knows the rest by its number."""
        status = path.stat()
        reason = "its entry in the index was lost"
        row = (
            int(path.stem), status.st_mtime, "", None, "unknown", None, None, reason, "", file,
            status.st_size,
        )  # fmt: skip
        self._db.execute(_INSERT.replace("REPLACE", "IGNORE"), row)
        if not self._db.execute("SELECT 1 FROM images WHERE file = ?", (file,)).fetchone():
            path.unlink(missing_ok=True)  # a later part has its number
