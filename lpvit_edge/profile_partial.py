"""What an interrupted profile leaves, so that the next one goes on."""

from collections.abc import Callable
from typing import ClassVar

import msgspec

from lpvit_edge import files
from lpvit_edge import profile as profiling
from lpvit_edge.errors import FileFormatError
from lpvit_edge.job import Job
from lpvit_edge.records import GemmCost, ModelIdentity, Record


class PartialProfile(Record, frozen=True, kw_only=True):
    """Costs measured so far, so that an interrupted profile goes on."""

    KIND: ClassVar[str] = "partial-profile"
    FORMAT: ClassVar[int] = 3

    fingerprint: str
    model: ModelIdentity
    engine: str
    threads: int
    patterns: tuple[str, ...]
    gemms: tuple[GemmCost, ...]
    method: str = "shared input"  # how layers were timed alone; others are not taken over
    power: str = "unknown"  # sensor and quality of the energies; unknown before format 2
    suspect: bool = False  # whether a reading behind the energies contradicted itself


class Partial:
    """The costs measured so far, on disk while the profile runs.

    `is_suspect` says whether a reading has contradicted itself by now; `was_suspect` whether one
    did in the runs that were taken over.
    """

    def __init__(
        self,
        job: Job,
        fingerprint: str,
        *,
        power: str,
        is_suspect: Callable[[], bool] = lambda: False,
    ) -> None:
        self._is_suspect = is_suspect
        self.was_suspect = False
        self.path = job.path("device_profile.partial.json")
        self.empty = PartialProfile(
            fingerprint=fingerprint,
            model=job.model.identity,
            engine=job.engine,
            threads=job.threads,
            patterns=job.patterns,
            gemms=(),
            method=profiling.METHOD,
            power=power,
        )

    def kept(self) -> tuple[GemmCost, ...]:
        """What an interrupted run under the very same conditions left."""
        if not self.path.exists():
            return ()
        try:
            found = files.load(PartialProfile, self.path)
        except FileFormatError:  # of another version: nothing is lost but the time
            return ()
        if msgspec.structs.replace(found, gemms=(), suspect=False) != self.empty:
            return ()
        self.was_suspect = found.suspect
        return found.gemms

    def keep(self, gemms: tuple[GemmCost, ...]) -> None:
        suspect = self.was_suspect or self._is_suspect()
        files.save(msgspec.structs.replace(self.empty, gemms=gemms, suspect=suspect), self.path)

    def done(self) -> None:
        self.path.unlink(missing_ok=True)
