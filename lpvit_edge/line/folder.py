"""A watched folder: an image is claimed by renaming it, judged, and put away.

    folder/part17.png            put there by a rename (a file that is still written is not ready)
    folder/claimed/42.part17.png frame number 42, being judged
    folder/done/42.part17.png    has its verdict

After a crash, what lies in claimed/ without a verdict is judged again under its number.
"""

import contextlib
import threading
from pathlib import Path

from lpvit_edge.errors import DataError, SourceError
from lpvit_edge.images import SUFFIXES, decode_pixels
from lpvit_edge.line.config import FolderSource
from lpvit_edge.line.feed import Health, Intake
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.guarded import GuardedThread
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.records import Severity
from lpvit_edge.line.sequence import SequenceFile


class FolderFeed:
    """Claims the images of a folder, oldest first."""

    def __init__(
        self, config: FolderSource, intake: Intake, sequence: SequenceFile, journal: Journal
    ) -> None:
        self._config = config
        self._folder = Path(config.target)
        self._claimed, self._done = self._folder / "claimed", self._folder / "done"
        self._intake = intake
        self._sequence = sequence
        self._journal = journal
        self._paths: dict[int, Path] = {}
        self._number: int | None = None  # taken, and not yet an image's
        self._stopping = threading.Event()
        self.thread = GuardedThread(self._run, name="folder")
        self.health = Health(since_ns=intake.clock.monotonic_ns())

    def start(self) -> None:
        """Judge what a crash left claimed, then watch. Raises SourceError for no such folder."""
        if not self._folder.is_dir():
            raise SourceError(f"{self._folder}: no such folder; make it, or check its mount")
        self._claimed.mkdir(exist_ok=True)
        self._done.mkdir(exist_ok=True)
        self.thread.start()

    def stop(self) -> None:
        """Claim no more."""
        self._stopping.set()
        self._intake.queue.close()
        self.thread.join()

    def claimed_numbers(self) -> frozenset[int]:
        """Frames that a crash left claimed: they will be judged and are not lost."""
        names = (path.name for path in _files(self._claimed)) if self._claimed.is_dir() else ()
        return frozenset(n for name in names if (n := _number(name)) is not None)

    def settled(self, frame: Frame) -> None:
        """Put the image away; one that cannot be stays in claimed/ until the next start."""
        path = self._paths.pop(frame.number, None)
        if path is None:
            return
        try:
            self._put_away(path)
        except OSError as error:  # unmounted, read-only or full: the verdict stands all the same
            self._say("lost", f"{path}: {error.strerror}")

    def _put_away(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._config.keep:
                path.rename(self._done / path.name)
            else:
                path.unlink()

    def _run(self) -> None:
        has_taken_up = False
        while not self._stopping.is_set():
            try:
                if not has_taken_up:
                    self._take_up()
                    has_taken_up = True
                self._look()
            except OSError as error:  # unmounted, read-only, or taken away before it was looked at
                self._say("lost", f"{self._folder}: {error.strerror}")
            else:
                self._say("live", "")
            self._intake.clock.wait(self._stopping, self._config.poll_s)

    def _take_up(self) -> None:
        """What a crash left claimed; may be called again where it raised OSError."""
        for path in sorted(_files(self._claimed)):
            number = _number(path.name)
            if number is None or number in self._paths:
                continue
            if self._journal.has(number):
                self._put_away(path)
            else:
                self._hand_in(number, path)

    def _look(self) -> None:
        self._claimed.mkdir(exist_ok=True)
        found = sorted(_files(self._folder), key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in found:
            if self._stopping.is_set():
                return
            claimed = self._claim(path)
            self._say("live", "")
            if claimed is not None:
                self._hand_in(*claimed)

    def _claim(self, path: Path) -> tuple[int, Path] | None:
        """Number an image and rename it; None where another line was faster.

        Where it cannot be renamed it stays in the folder, and the number is the next image's.
        """
        if self._number is None:
            self._number = self._sequence.next()
        claimed = self._claimed / f"{self._number}.{path.name}"
        try:
            path.rename(claimed)
        except FileNotFoundError:
            return None
        number, self._number = self._number, None
        return number, claimed

    def _hand_in(self, number: int, path: Path) -> None:
        pixels = lost = None
        captured_at = self._intake.clock.unix_s()
        try:
            captured_at = path.stat().st_mtime
            pixels = decode_pixels(path.read_bytes(), name=path.name)
        except (OSError, DataError) as error:
            lost = f"corrupt frame: {error}"
        self._paths[number] = path
        now_ns = self._intake.clock.monotonic_ns()
        self._intake.accept(
            Frame(
                number=number,
                captured_at=captured_at,
                captured_ns=now_ns,
                received_ns=now_ns,
                pixels=pixels,
                name=path.name.partition(".")[2],
                lost=lost,
            ),
            comes_again=True,
        )

    def _say(self, state: str, text: str) -> None:
        if state == self.health.state:
            return
        self.health.state = "live" if state == "live" else "lost"
        self.health.text = text
        self.health.since_ns = self._intake.clock.monotonic_ns()
        severity: Severity = "info" if state == "live" else "alarm"
        self._intake.settlement.event("source", f"{state}: {text}" if text else state, severity)


def _files(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def _number(name: str) -> int | None:
    head = name.partition(".")[0]
    return int(head) if head.isdecimal() else None
