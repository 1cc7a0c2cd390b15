"""One JSON object a line: {"entry": 17, "kind": "frame", "record": {...}}."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lpvit_edge.errors import SinkError
from lpvit_edge.line.journal import Entry, as_json
from lpvit_edge.line.sink_config import JsonlSink

_TAIL = 1 << 20  # bytes; more than any line


class _Line(msgspec.Struct):
    entry: int


class JsonLines:
    """A file that is appended to. Each entry stands in it once, also after a kill -9."""

    batch = 200
    longest_wait_s = 15.0
    missed = 0

    def __init__(self, config: JsonlSink) -> None:
        self.name = f"jsonl {config.target}"
        self._path = Path(config.target)

    def resume(self, delivered: int, newest: int) -> int:
        """The file itself says what is in it; a last line that was cut is removed."""
        try:
            last = self._last_line()
        except FileNotFoundError:
            return delivered
        except OSError as error:
            raise SinkError(f"{self.name}: {error.strerror}") from error
        try:
            written = msgspec.json.decode(last, type=_Line).entry
        except msgspec.DecodeError:
            return delivered  # it is empty, or was begun by something else
        # A journal that ends before the file does is a new one, or lost its last moments.
        return written if written <= newest else delivered

    def _last_line(self) -> bytes:
        """The last whole line; what follows it was cut, and is removed."""
        with self._path.open("r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL))
            tail = stream.read()
            whole = tail.rpartition(b"\n")[0]
            stream.truncate(size - len(tail) + (len(whole) + 1 if whole else 0))
        return whole.rpartition(b"\n")[2]

    def too_old(self, entries: Sequence[Entry]) -> int:
        """Nothing is ever too old."""
        return 0

    def send(self, entries: Sequence[Entry]) -> None:
        """Append the entries with one write; a file that could take only a part is cut back."""
        content = b"".join(as_json(entry) + b"\n" for entry in entries)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as stream:
                before = stream.seek(0, os.SEEK_END)
                if stream.write(content) != len(content):
                    stream.truncate(before)
                    raise SinkError(f"{self.name}: the disk is full")
        except OSError as error:
            raise SinkError(f"{self.name}: {error.strerror}") from error

    def beat(self, *, is_held: bool) -> None:
        """A file has no safe position."""

    def disconnect(self) -> None:
        """Nothing is kept open."""
