"""Where a line has its bundle from, and the way back to a denser one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from lpvit_edge.bundle import Bundle, open_bundle, refuse_other_device
from lpvit_edge.errors import LpvitEdgeError, UnknownOptionError

if TYPE_CHECKING:
    from lpvit_edge.line.line import Line

LOOK_S = 1.0  # between two looks at store.json


class Bundles(Protocol):
    """Where a line has its bundle from."""

    def begin(self) -> Bundle:
        """The bundle to start with."""
        ...

    def tell(self, line: "Line") -> None:
        """Record what happened before there was a line."""
        ...

    def starting(self) -> None:
        """The engine is loaded next."""
        ...

    def go_back(self, reason: str) -> bool:
        """Leave the bundle that failed its warm-up; False where there is no other."""
        ...

    def look(self, line: "Line") -> None:
        """Called between frames."""
        ...

    def fall_back(self, line: "Line", reason: str) -> None:
        """Offer the denser bundle to the line."""
        ...

    def beside(self, named: str) -> Bundle:
        """The bundle of the shadow: "dense", or a folder. Raises UnknownOptionError for none."""
        ...

    def end(self) -> None:
        """The line ended as it should."""
        ...


_NO_DENSE = (
    "no denser bundle to fall back on: name one as `fallback` in [drift], or use `lpvit install "
    "--dense` and `lpvit run --store`"
)


def for_this_device(bundle: Bundle, *, other_device: bool, rebuild: bool) -> Bundle:
    """The bundle, refused where it is of another device and neither option allows that."""
    if not (other_device or rebuild):
        refuse_other_device(bundle)
    return msgspec.structs.replace(bundle, rebuild=rebuild)


class Wish:
    """To fall back on the denser bundle, kept until the line has room to prove it.

    Asked for in the hub's thread, granted in the line's.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._asked_s = 0.0

    def ask(self, line: "Line", reason: str, offer: Callable[[], bool]) -> None:
        """Offer it now; where another bundle is being proven, say so and keep the wish."""
        if offer():
            self._reason = None
            return
        if self._reason is None:
            text = f"the denser bundle waits until another one is proven: {reason}"
            line.settlement.event("bundle", text, "warning")
        self._reason, self._asked_s = reason, time.monotonic()

    def due(self) -> str | None:
        """Why to try again now, None where nothing is wished or it was tried just before."""
        reason = self._reason
        if reason is None or time.monotonic() - self._asked_s < LOOK_S:
            return None
        return reason

    def forget(self) -> None:
        """It runs, or cannot."""
        self._reason = None


class OneBundle:
    """A folder that was named, and perhaps a denser one for a red drift alarm."""

    def __init__(
        self,
        folder: Path,
        *,
        fallback: Path | None = None,
        other_device: bool = False,
        rebuild: bool = False,
    ) -> None:
        self._folder = folder
        self._rebuild = rebuild
        self._fallback = fallback
        self._other_device = other_device
        self._wish = Wish()

    def begin(self) -> Bundle:
        """The bundle; a fallback that cannot run is refused now, and not when it is needed."""
        if self._fallback is not None:
            self._opened(self._fallback)
        return self._opened(self._folder)

    def tell(self, line: "Line") -> None:
        """Nothing happened before."""

    def starting(self) -> None:
        """Nothing is counted."""

    def go_back(self, reason: str) -> bool:
        return False

    def look(self, line: "Line") -> None:
        """Nothing is installed here, but a way back may still be waiting."""
        if (reason := self._wish.due()) is not None:
            self.fall_back(line, reason)

    def fall_back(self, line: "Line", reason: str) -> None:
        """Offer the bundle that the rules name, until the next start."""
        if self._fallback is None:
            line.settlement.event("bundle", _NO_DENSE, "alarm")
            return
        if line.bundle.folder == self._fallback:
            self._wish.forget()
            return  # the denser one sees the drift too
        try:
            dense = self._opened(self._fallback)
            self._wish.ask(line, reason, lambda: line.swap.offer(dense, reason))
        except LpvitEdgeError as error:
            self._wish.forget()
            line.settlement.event("bundle", f"no way back to a denser bundle: {error}", "alarm")

    def beside(self, named: str) -> Bundle:
        if named != "dense":
            return self._opened(Path(named))
        if self._fallback is None:
            raise UnknownOptionError(
                "--shadow dense needs --store, or `fallback` in [drift]; or give a bundle's folder"
            )
        return self._opened(self._fallback)

    def end(self) -> None:
        """Nothing was noted."""

    def _opened(self, folder: Path) -> Bundle:
        bundle = open_bundle(folder)
        return for_this_device(bundle, other_device=self._other_device, rebuild=self._rebuild)
