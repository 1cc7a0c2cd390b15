"""The number of the last frame, in a file that outlives every process.

The number is written into a mapped page before the frame is handed on. The page belongs to the
kernel, so that after a kill -9 the next process knows which frames were taken and never judged.
"""

import mmap
import os
import struct
from pathlib import Path
from types import TracebackType

from lpvit_edge.errors import FileFormatError

_MAGIC = b"lpvitsq1"
_FIELDS = struct.Struct("<8sQq")  # magic, frames taken, the camera's own counter (-1: none)


class SequenceFile:
    """Counts frames over restarts; one process writes, others may read."""

    def __init__(self, path: Path) -> None:
        """Open or make the file. Raises FileFormatError where another file lies there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(handle).st_size == 0:
                os.write(handle, _FIELDS.pack(_MAGIC, 0, -1))
                os.fsync(handle)
            if os.fstat(handle).st_size != _FIELDS.size:
                raise FileFormatError(
                    f"{path}: not a file of frame numbers; choose another --state"
                )
            self._page = mmap.mmap(handle, _FIELDS.size)
        finally:
            os.close(handle)
        if self._page[:8] != _MAGIC:
            raise FileFormatError(f"{path}: not a file of frame numbers; choose another --state")

    @property
    def taken(self) -> int:
        """Number of the last frame; 0 before the first."""
        return int(_FIELDS.unpack(self._page[:])[1])

    @property
    def counter(self) -> int | None:
        """The camera's own counter with the last frame that carried one."""
        value = int(_FIELDS.unpack(self._page[:])[2])
        return None if value < 0 else value

    def next(self) -> int:
        """Take the next number."""
        number = self.taken + 1
        self._page[8:16] = struct.pack("<Q", number)
        return number

    def reach(self, number: int) -> None:
        """Go on from that number at least."""
        if number > self.taken:
            self._page[8:16] = struct.pack("<Q", number)

    def note_counter(self, counter: int) -> None:
        """Remember the camera's own counter."""
        self._page[16:24] = struct.pack("<q", counter)

    def close(self) -> None:
        """Unmap the file."""
        self._page.close()

    def __enter__(self) -> "SequenceFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
