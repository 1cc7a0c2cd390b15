"""What was decided, in order, on disk before anybody is told.

One SQLite file in write-ahead mode: a commit is a write into the page cache, which survives a
kill -9 of this process (after a power loss the last moments may be missing, never half an entry).
Sinks read it with a cursor each, so what a broker or a full disk refuses is delivered later, in
order.
"""

import contextlib
import sqlite3
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from lpvit_edge.errors import EnvironmentUnfitError, FileFormatError, LpvitEdgeError
from lpvit_edge.line.records import FrameRecord, LineEvent

_TABLES = """
CREATE TABLE IF NOT EXISTS entries(
  id INTEGER PRIMARY KEY AUTOINCREMENT, number INTEGER, kind TEXT NOT NULL, body BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS by_number ON entries(number) WHERE number IS NOT NULL;
CREATE TABLE IF NOT EXISTS cursors(sink TEXT PRIMARY KEY, delivered INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS marks(name TEXT PRIMARY KEY, value INTEGER NOT NULL);
"""
# The log is moved into the file by checkpoint(); beyond so many pages (32 MB) by who writes next.
_SETTINGS = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA wal_autocheckpoint=8000;"
_LOCKED_S = 0.02  # for another program that writes; verdicts do not wait longer
BACKLOG = 100_000  # entries kept in memory while the disk refuses them


def _refusal(path: Path, error: sqlite3.DatabaseError) -> LpvitEdgeError:
    """The disk's, which nothing that is moved away can mend, or the file's own."""
    if isinstance(error, sqlite3.OperationalError):
        return EnvironmentUnfitError(
            f"{path}: the journal cannot be used ({error}); is the disk full or broken, may this "
            "user write there?"
        )
    return FileFormatError(
        f"{path}: the journal cannot be used ({error}); move the file away to start anew"
    )


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the journal. `body` is the JSON of a FrameRecord or a LineEvent."""

    id: int
    kind: str  # "frame" or "event"
    body: bytes


def as_json(entry: Entry) -> bytes:
    """The entry as sinks hand it on: {"entry": 17, "kind": "frame", "record": {...}}."""
    fields = {"entry": entry.id, "kind": entry.kind, "record": msgspec.Raw(entry.body)}
    return msgspec.json.encode(fields)


class Journal:
    """Appended to by the judge, read by the sinks; any thread may call."""

    def __init__(self, path: Path, *, keep: int = 200_000) -> None:
        """Open or make it; `keep` entries stay after delivery.

        Raises FileFormatError for a damaged file, EnvironmentUnfitError where the disk refuses.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.RLock()
        self._new = threading.Condition(self._lock)
        self._keep = keep
        self._since_prune = 0
        self._backlog: deque[tuple[int | None, str, bytes]] = deque()
        self.lost = 0  # entries that the disk refused for too long
        self.repeated = 0  # verdicts on numbers that have one already: not written
        self.refusal: str | None = None  # why the latest entry that could not be written was not
        self._given_up: Counter[str] = Counter()
        self._closed = False
        try:
            self._db = sqlite3.connect(
                path, check_same_thread=False, isolation_level=None, timeout=_LOCKED_S
            )
            self._db.executescript(_SETTINGS + _TABLES)
            # Of its own, so that no verdict waits while it waits for the disk.
            self._tidying = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            newest = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name='entries'")
            self._last_id = int((newest.fetchone() or (0,))[0])
        except sqlite3.DatabaseError as error:
            raise _refusal(path, error) from error

    def append(
        self,
        item: FrameRecord | LineEvent,
        *,
        otherwise: Callable[[], FrameRecord] | None = None,
    ) -> bool:
        """Write an entry; False where the disk refused and it waits in memory instead.

        What waits is `otherwise()` where that is given. False too once it is closed: whoever
        watches a line may still have something to say then.
        """
        number = item.number if isinstance(item, FrameRecord) else None
        kind = "event" if number is None else "frame"
        with self._lock:
            if self._closed:
                return False
            self._backlog.append((number, kind, msgspec.json.encode(item)))
            written = self.flush()
            if not written and otherwise is not None:
                # Still the last one: nobody else can have come in between.
                self._backlog[-1] = (number, kind, msgspec.json.encode(otherwise()))
            return written

    def flush(self) -> bool:
        """Write what waits in memory, in order; False where the disk still refuses."""
        with self._lock:
            try:
                self._write_backlog()
                if self._since_prune >= 2000:
                    self._prune()
            except sqlite3.DatabaseError as error:  # full, read-only, gone, damaged
                self.refusal = str(error)
                self._shorten_backlog()
            self._new.notify_all()
            return not self._backlog

    def _write_backlog(self) -> None:
        while self._backlog:
            done = self._db.execute(
                "INSERT OR IGNORE INTO entries(number, kind, body) VALUES(?, ?, ?)",
                self._backlog[0],
            )
            if done.rowcount:
                self._last_id = int(done.lastrowid or 0)
            else:
                self.repeated += 1
            self._backlog.popleft()
            self._since_prune += 1

    def _shorten_backlog(self) -> None:
        while len(self._backlog) > BACKLOG:
            self._backlog.popleft()
            self.lost += 1

    @property
    def waiting(self) -> int:
        """Entries that the disk refused so far."""
        return len(self._backlog)  # without the lock, which may wait for a disk

    def after(self, entry_id: int, *, limit: int = 100) -> tuple[Entry, ...]:
        """The entries that follow one, oldest first."""
        rows = self._read(
            "SELECT id, kind, body FROM entries WHERE id > ? ORDER BY id LIMIT ?", entry_id, limit
        )
        return tuple(Entry(id=row[0], kind=row[1], body=row[2]) for row in rows)

    def wait_after(self, entry_id: int, timeout_s: float) -> None:
        """Sleep until there is an entry after that one, or the timeout."""
        with self._new:
            self._new.wait_for(lambda: self.last_id() > entry_id, timeout_s)

    def last_id(self) -> int:
        """Id of the newest entry; 0 in an empty journal."""
        return self._last_id  # asked for by each sink at each verdict, and of a disk that fails

    def has(self, number: int) -> bool:
        """Whether the frame of that number has its verdict."""
        return bool(self._read("SELECT 1 FROM entries WHERE number = ?", number))

    def last_number(self) -> int:
        """The highest frame number that has a verdict here; 0 where none has."""
        return int(self._read("SELECT MAX(number) FROM entries")[0][0] or 0)

    def missing(self, after: int, through: int) -> tuple[int, ...]:
        """Frame numbers in (after, through] without a verdict."""
        rows = self._read(
            "SELECT number FROM entries WHERE number > ? AND number <= ?", after, through
        )
        found = {row[0] for row in rows}
        return tuple(n for n in range(after + 1, through + 1) if n not in found)

    def mark(self, name: str, value: int) -> None:
        """Remember a number under a name, if it is higher; nothing where the disk refuses."""
        self._store(
            "INSERT INTO marks(name, value) VALUES(?, ?) ON CONFLICT(name) DO UPDATE "
            "SET value = excluded.value WHERE excluded.value > value",
            (name, value),
        )

    def marked(self, name: str) -> int | None:
        """The number under that name; None before the first."""
        return self._value("SELECT value FROM marks WHERE name = ?", name)

    def delivered(self, sink: str) -> int:
        """Id of the last entry that a sink took."""
        return self._value("SELECT delivered FROM cursors WHERE sink = ?", sink) or 0

    def set_delivered(self, sink: str, entry_id: int) -> None:
        """A sink took everything up to that entry; where the disk refuses, it is told twice."""
        self._store(
            "INSERT OR REPLACE INTO cursors(sink, delivered) VALUES(?, ?)", (sink, entry_id)
        )

    def given_up(self, sink: str) -> int:
        """Verdicts that a sink never took and that had to be removed: too many waited for it."""
        return self._given_up[sink]  # without the lock, which may wait for a disk

    def forget_other_sinks(self, names: Iterable[str]) -> None:
        """A sink that is no longer configured must not hold back the journal."""
        kept = set(names)
        for (name,) in self._read("SELECT sink FROM cursors"):
            if name not in kept:
                self._store("DELETE FROM cursors WHERE sink = ?", (name,))

    def _store(self, statement: str, values: tuple[object, ...]) -> bool:
        with self._lock:
            try:
                self._db.execute(statement, values)
            except sqlite3.DatabaseError:
                return False
            return True

    def _value(self, query: str, name: str) -> int | None:
        rows = self._read(query, name)
        return int(rows[0][0]) if rows else None

    def _read(self, query: str, *values: object) -> list[Any]:
        """The rows. Raises what __init__ does."""
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise _refusal(self._path, error) from error

    def _prune(self) -> None:
        """Remove what every sink has taken, and anything beyond ten times `keep`: that is lost."""
        self._since_prune = 0
        last = self.last_id()
        slowest = self._db.execute("SELECT MIN(delivered) FROM cursors").fetchone()[0]
        taken = min(last - self._keep, last if slowest is None else slowest)
        through = max(taken, last - 10 * self._keep)
        lost = self._not_taken(through) if through > taken else {}
        if self._store("DELETE FROM entries WHERE id <= ?", (through,)):
            self._given_up.update(lost)

    def _not_taken(self, through: int) -> dict[str, int]:
        """By sink, verdicts up to that entry that it has not taken."""
        query = "SELECT COUNT(*) FROM entries WHERE id > ? AND id <= ? AND kind = 'frame'"
        cursors = self._db.execute("SELECT sink, delivered FROM cursors").fetchall()
        return {
            sink: int(self._db.execute(query, (delivered, through)).fetchone()[0])
            for sink, delivered in cursors
        }

    def checkpoint(self) -> None:
        """Move what the log holds into the file, while others write; called by one thread.

        That waits for the disk several times. Left to the verdict that makes the log long enough,
        it delays that verdict.
        """
        with contextlib.suppress(sqlite3.DatabaseError):  # tried again
            self._tidying.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def close(self) -> None:
        """Write what waits and close the file."""
        with self._lock:
            self.flush()
            self._closed = True
            self._tidying.close()
            self._db.close()
