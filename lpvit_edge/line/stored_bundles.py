"""A device's store, as one line uses it: installations, crash loops and the way back."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge.bundle import Bundle, open_bundle
from lpvit_edge.crash_loop import (
    MOST_STARTS,
    WITHIN_S,
    failed_starts,
    forget_starts,
    note_start,
    this_moment,
)
from lpvit_edge.errors import LpvitEdgeError
from lpvit_edge.line.bundles import LOOK_S, Wish, for_this_device
from lpvit_edge.line.records import Severity
from lpvit_edge.store import BundleStore, Role

if TYPE_CHECKING:
    from lpvit_edge.line.line import Line


class StoredBundles:
    """The store, as one line uses it: begin(), tell(), starting(), then look() between frames."""

    def __init__(
        self,
        store: BundleStore,
        *,
        other_device: bool = False,
        rebuild: bool = False,
        most_starts: int = MOST_STARTS,
        within_s: float = WITHIN_S,
    ) -> None:
        self._store = store
        self._other_device = other_device
        self._rebuild = rebuild
        self._most_starts = most_starts
        self._within_s = within_s
        self._starts = store.folder / "starts.json"
        self._known: str | None = None  # the current bundle that was looked at last
        self._on_dense = False
        self._running: Bundle | None = None
        self._role: Role = "current"  # `previous` where store.json could not be written
        self._works = False
        self._looked_s = 0.0
        self._wish = Wish()
        self.told: list[tuple[str, Severity]] = []  # before there is a line to tell it

    def begin(self) -> Bundle:
        """The bundle to start with.

        Goes back to `previous` where `current` is damaged, or did not come to a verdict in the
        last starts. Raises what open_bundle raises where nothing is left.
        """
        record = self._store.record()
        self._running = None
        if record.on_dense is not None:
            self._known, self._on_dense = record.current, True
            self.told.append((f"the denser bundle runs: {record.on_dense}", "warning"))
            return self._opened("dense")
        name = record.current
        if name is not None:
            failed = failed_starts(self._starts, this_moment(name), within_s=self._within_s)
            if len(failed) >= self._most_starts:
                self.go_back(f"{len(failed)} starts within {self._within_s:g} s without a verdict")
        try:
            bundle = self._opened(self._role)
        except LpvitEdgeError as error:
            if not self.go_back(str(error)):
                raise
            bundle = self._opened(self._role)
        self._known = self._store.record().current
        self._running = bundle
        return bundle

    def starting(self) -> None:
        """Note the start on disk, before the engine is loaded."""
        if self._running is None:
            return  # the dense bundle: nothing stands before it
        try:
            start = this_moment(self._running.folder.name)
            note_start(self._starts, start, within_s=self._within_s)
        except OSError as error:  # a full disk must not keep the line from starting
            self.told.append((f"this start could not be noted: {error}", "warning"))

    def go_back(self, reason: str) -> bool:
        """Leave the current bundle for the previous one; False where there is none."""
        record = self._store.record()
        left = record.current
        gone = False
        try:
            if left is not None and self._role == "current":
                gone = self._store.go_back(left, reason)
        except OSError as error:  # a full disk must not keep a line from the bundle that works
            self.told.append((f"store.json cannot be written: {error}", "warning"))
            self._role, gone = "previous", record.previous is not None
        if not gone:
            self.told.append((f"{reason}; there is no previous bundle to go back to", "alarm"))
            return False
        self._forget_starts()
        self._known = record.previous if self._role == "current" else left
        self.told.append((f"back to the previous bundle {record.previous}: {reason}", "alarm"))
        return True

    def look(self, line: "Line") -> None:
        """Between frames: a verdict proves the bundle, and a new one is offered to the line."""
        if not self._works and line.settlement.counts.ok + line.settlement.counts.reject > 0:
            self._works = True
            self._forget_starts()
        if (reason := self._wish.due()) is not None:
            self.fall_back(line, reason)
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s = time.monotonic()
        try:
            record = self._store.record()
            current = record.current
            # The one that a red alarm left may be installed again, which ends the dense one's time.
            ended = self._on_dense and record.on_dense is None
            if current is None or (current == self._known and not ended):
                return
            bundle = self._opened("current")
        except LpvitEdgeError as error:
            line.settlement.event("bundle", f"the store cannot be used: {error}", "alarm")
            self._looked_s += 60.0  # said again in a minute
            return
        if line.swap.offer(
            bundle, "it was installed", refused=lambda why: self._refused(line, why)
        ):
            self._known, self._on_dense = current, False

    def fall_back(self, line: "Line", reason: str) -> None:
        """Offer the dense bundle to the line, which stays with it until one is installed."""
        try:
            if self._store.record().on_dense is not None:
                self._wish.forget()
                return
            dense = self._opened("dense")
        except (LpvitEdgeError, OSError) as error:
            self._wish.forget()
            line.settlement.event("bundle", f"no way back to a denser bundle: {error}", "alarm")
            return
        noted = partial(self._note_dense, line, reason)
        self._wish.ask(line, reason, lambda: line.swap.offer(dense, reason, taken=noted))

    def tell(self, line: "Line") -> None:
        """Record what happened before there was a line."""
        for text, severity in self.told:
            line.settlement.event("bundle", text, severity)
        self.told.clear()

    def beside(self, named: str) -> Bundle:
        if named == "dense":
            return self._opened("dense")
        bundle = open_bundle(Path(named))
        return for_this_device(bundle, other_device=self._other_device, rebuild=self._rebuild)

    def end(self) -> None:
        """A clean end is no crash."""
        self._forget_starts()

    def _note_dense(self, line: "Line", reason: str) -> None:
        try:
            self._store.note_dense(reason)
            self._on_dense = True
        except OSError as error:
            text = f"the next start will not know that the denser bundle runs: {error}"
            line.settlement.event("bundle", text, "warning")

    def _refused(self, line: "Line", why: str) -> None:
        self.go_back(why)
        self.tell(line)

    def _opened(self, role: Role) -> Bundle:
        bundle = self._store.open(role)
        return for_this_device(bundle, other_device=self._other_device, rebuild=self._rebuild)

    def _forget_starts(self) -> None:
        try:
            forget_starts(self._starts)
        except OSError as error:
            self.told.append((f"the notes of starts could not be removed: {error}", "warning"))
