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
from lpvit_edge.line.bundles import Wish, for_this_device
from lpvit_edge.line.records import Severity
from lpvit_edge.store import BundleStore, Role

if TYPE_CHECKING:
    from lpvit_edge.line.line import Line

_LOOK_S = 1.0  # between two looks at store.json


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
        self._role: Role = "current"  # `previous` where store.json could not be written
        self._on_dense: str | None = None  # why the dense bundle runs, where it does
        self._dense_failed = False
        self._running: Bundle | None = None
        self._works = False
        self._looked_s = 0.0
        self._wish = Wish()
        self.told: list[tuple[str, Severity]] = []  # before there is a line to tell it

    def begin(self) -> Bundle:
        """The bundle to start with.

        Leaves the dense bundle for `current`, and that for `previous`, where one is damaged or did
        not come to a verdict in the last starts. Raises what open_bundle raises where nothing is
        left.
        """
        self._on_dense = None if self._dense_failed else self._store.record().on_dense
        if (name := self._name()) is not None:
            failed = failed_starts(self._starts, this_moment(name), within_s=self._within_s)
            if len(failed) >= self._most_starts:
                self.go_back(f"{len(failed)} starts within {self._within_s:g} s without a verdict")
        while self._running is None:
            try:
                self._running = self._opened(self._starting_role())
            except (LpvitEdgeError, OSError) as error:  # OSError: a bad block of the disk
                if not self.go_back(str(error)):
                    raise
        self._known = self._store.record().current
        if self._on_dense is not None:
            self.told.append((f"the denser bundle runs: {self._on_dense}", "warning"))
        return self._running

    def _starting_role(self) -> Role:
        return self._role if self._on_dense is None else "dense"

    def _name(self) -> str | None:
        """Of the bundle to start with."""
        path = self._store.path(self._starting_role())
        return None if path is None else path.name

    def starting(self) -> None:
        """Note the start on disk, before the engine is loaded."""
        if self._running is None:
            return
        try:
            start = this_moment(self._running.folder.name)
            note_start(self._starts, start, within_s=self._within_s)
        except OSError as error:  # a full disk must not keep the line from starting
            self.told.append((f"this start could not be noted: {error}", "warning"))

    def go_back(self, reason: str) -> bool:
        """Leave the bundle to start with for the one before; False where there is none."""
        self._running = None
        if self._on_dense is not None:
            return self._leave_dense(reason)
        return self._leave(self._name(), reason)

    def _leave_dense(self, reason: str) -> bool:
        self._on_dense, self._dense_failed = None, True
        try:
            self._store.leave_dense(reason)
        except OSError as error:  # the next start tries it again, and leaves it again
            self.told.append((f"store.json cannot be written: {error}", "warning"))
        self._forget_starts()
        self.told.append((f"back from the denser bundle to the current one: {reason}", "alarm"))
        return True

    def _leave(self, left: str | None, reason: str) -> bool:
        """Go back from `current`, where it still is the bundle of that name, to `previous`."""
        record = self._store.record()
        if record.current != left:
            return False  # another one was installed meanwhile, and is looked at next
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
        """Between frames: a verdict proves the bundle, and another one is offered to the line."""
        if not self._works and line.settlement.counts.ok + line.settlement.counts.reject > 0:
            self._works = True
            self._forget_starts()
        self._wish.grant(line, lambda reason: self._offer_dense(line, reason))
        if time.monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = time.monotonic()
        try:
            self._offer_installed(line)
        except (LpvitEdgeError, OSError) as error:
            line.settlement.event("bundle", f"the store cannot be used: {error}", "alarm")
            self._looked_s += 60.0  # said again in a minute

    def _offer_installed(self, line: "Line") -> None:
        record = self._store.record()
        name, on_dense = record.current, self._on_dense
        # The one that a red alarm left may be installed again, which ends the dense one's time.
        ended = on_dense is not None and record.on_dense is None
        if name is None or (name == self._known and not ended):
            return
        known, self._known, self._on_dense = self._known, name, None  # before it may be refused
        refused = partial(self._refused, line, name, on_dense)
        if not line.swap.offer(
            partial(self._opened, "current"), "it was installed", refused=refused
        ):
            self._known, self._on_dense = known, on_dense

    def _refused(self, line: "Line", name: str, on_dense: str | None, why: str) -> None:
        """The line goes on with what it has: so does the next start."""
        try:
            self._leave(name, why)
        except (LpvitEdgeError, OSError) as error:
            self.told.append((f"the store cannot be used: {error}", "alarm"))
        if on_dense is not None and (known := self._known) is not None:
            self._note_dense(line, known, on_dense)
        self.tell(line)

    def fall_back(self, line: "Line", reason: str, *, of: Bundle) -> None:
        """Go over to the dense bundle, which runs until one is installed."""
        try:
            record = self._store.record()
            dense = self._store.path("dense")
        except (LpvitEdgeError, OSError) as error:
            line.settlement.event("bundle", f"no way back to a denser bundle: {error}", "alarm")
            return
        if of.folder == dense:
            return  # the denser one sees the drift too
        if record.dense in record.left:
            text = f"no way back to the denser bundle, it failed: {record.left[record.dense]}"
            line.settlement.event("bundle", text, "alarm")
            return
        self._wish.ask(reason, of)

    def _offer_dense(self, line: "Line", reason: str) -> bool:
        noted = partial(self._note_dense, line, line.bundle.folder.name, reason)
        return line.swap.offer(partial(self._opened, "dense"), reason, taken=noted)

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

    def _note_dense(self, line: "Line", name: str, reason: str) -> None:
        """The dense bundle runs in the place of `name`, after a restart too."""
        try:
            if self._store.note_dense(name, reason):
                self._on_dense = reason
        except OSError as error:
            text = f"the next start will not know that the denser bundle runs: {error}"
            line.settlement.event("bundle", text, "warning")

    def _opened(self, role: Role) -> Bundle:
        bundle = self._store.open(role)
        return for_this_device(bundle, other_device=self._other_device, rebuild=self._rebuild)

    def _forget_starts(self) -> None:
        try:
            forget_starts(self._starts)
        except OSError as error:
            self.told.append((f"the notes of starts could not be removed: {error}", "warning"))
