"""What every source can do."""

from typing import Protocol

from lpvit_edge.line.frames import Captured


class EndOfSource(Exception):  # noqa: N818 - an end is no error
    """A file has no more frames."""


class Source(Protocol):
    """An open camera or file."""

    def read(self, timeout_s: float) -> Captured | None:
        """The next frame, or None when none came in time: a triggered camera may rest.

        Raises SourceError when the camera was lost, EndOfSource at the end of a file.
        """
        ...

    def close(self) -> None:
        """Let go of the camera."""
        ...
