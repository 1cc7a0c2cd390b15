"""Starts that came to nothing, counted on disk: the way back from a bundle that kills its process.

A start is written down before the engine is touched and crossed out with the first verdict or a
clean end, so a kill -9 or a crash of the driver leave it standing. Those of earlier boots do not
count: they ended with the machine, by a power cut for all that is known, and a bundle was proven on
this device before it was installed. Ages are taken from CLOCK_BOOTTIME, which no time server sets.
"""

import time
from pathlib import Path
from typing import ClassVar

from lpvit_edge import files
from lpvit_edge.errors import FileFormatError
from lpvit_edge.records import Part, Record

MOST_STARTS = 3  # without a verdict
WITHIN_S = 300.0


class Start(Part, frozen=True, kw_only=True):
    """One start. `boot` is the kernel's number of this boot, `up_s` CLOCK_BOOTTIME."""

    bundle: str
    boot: str
    up_s: float
    at: float  # seconds since 1970, UTC; for people


class StartsRecord(Record, frozen=True, kw_only=True):
    """starts.json."""

    KIND: ClassVar[str] = "starts"

    starts: tuple[Start, ...] = ()


def this_moment(bundle: str) -> Start:
    """A start of that bundle now."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return Start(
        bundle=bundle,
        boot=boot.read_text().strip() if boot.exists() else "unknown",
        up_s=time.clock_gettime(time.CLOCK_BOOTTIME),
        at=time.time(),
    )


def failed_starts(path: Path, now: Start, *, within_s: float = WITHIN_S) -> tuple[Start, ...]:
    """Starts of the same bundle in this boot that gave no verdict, younger than `within_s`."""
    return tuple(
        start
        for start in _read(path)
        if (start.bundle, start.boot) == (now.bundle, now.boot)
        and now.up_s - start.up_s <= within_s
    )


def note_start(path: Path, now: Start, *, within_s: float = WITHIN_S) -> None:
    """Write a start down, durably, and forget old ones."""
    recent = failed_starts(path, now, within_s=within_s)
    files.save(StartsRecord(starts=(*recent, now)), path)


def forget_starts(path: Path) -> None:
    """A verdict came, or a clean end: the bundle works."""
    path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Start, ...]:
    """A file that cannot be read counts as none: it must not keep a line from starting."""
    try:
        return files.load(StartsRecord, path).starts
    except FileFormatError:
        return ()
