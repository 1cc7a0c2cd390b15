"""What a controller is told of: counts of this run, and verdicts that can still be acted on.

A reject that comes late rejects another part. So a verdict has an age at which it is not told any
more, taken from the trigger by the clock that never jumps; it is counted as missed instead.
"""

import time
from collections.abc import Sequence

import msgspec

from lpvit_edge.line.journal import Entry
from lpvit_edge.line.records import FrameRecord


class Timely(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict that is still of use."""

    entry: int
    record: FrameRecord
    age_ms: float


class Tally:
    """Counts each verdict once, however often its entry is offered."""

    def __init__(self, max_age_ms: float) -> None:
        self._max_age_ms = max_age_ms
        self._counted = 0  # entries up to this one
        self._late: set[int] = set()
        self.ok = self.reject = self.safe = self.missed = 0

    def take(self, entry: Entry) -> Timely | None:
        """Count an entry; None where it is no verdict, or one that is too old or untimed."""
        if entry.kind != "frame":
            return None
        record = msgspec.json.decode(entry.body, type=FrameRecord)
        if entry.id > self._counted:
            self._counted = entry.id
            setattr(self, record.verdict, getattr(self, record.verdict) + 1)
        return self._timely(entry.id, record)

    def still(self, timely: Sequence[Timely]) -> list[Timely]:
        """Those that can still be acted on, with their ages now; the others are counted."""
        found = [self._timely(one.entry, one.record) for one in timely]
        return [one for one in found if one is not None]

    def _timely(self, entry_id: int, record: FrameRecord) -> Timely | None:
        age_ms = (time.monotonic_ns() - record.captured_ns) / 1e6
        # Below zero: it was decided before this machine was started anew.
        if not record.untimed and 0 <= age_ms <= self._max_age_ms:
            return Timely(entry=entry_id, record=record, age_ms=age_ms)
        self.miss(entry_id)
        return None

    def miss(self, entry_id: int) -> None:
        """Count an entry, once, that the other side was not told or may not have been told."""
        if entry_id not in self._late:
            self._late.add(entry_id)
            self.missed += 1

    def too_old(self, entries: Sequence[Entry]) -> int:
        """How many of the first entries need not be told; they are not offered again."""
        count = 0
        for entry in entries:
            if self.take(entry) is not None:
                break
            count += 1
        if count:
            self.forget(entries[count - 1].id)
        return count

    @property
    def remembered(self) -> int:
        """Late entries that may be offered again."""
        return len(self._late)

    def forget(self, through: int) -> None:
        """Entries up to that one are not offered again."""
        self._late = {entry for entry in self._late if entry > through}
