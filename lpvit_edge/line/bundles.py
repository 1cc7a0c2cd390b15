"""Where a line has its bundle from, and the way back to a denser one."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from lpvit_edge.bundle import Bundle, open_bundle, refuse_other_device
from lpvit_edge.errors import UnknownOptionError

if TYPE_CHECKING:
    from lpvit_edge.line.line import Line


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

    def fall_back(self, line: "Line", reason: str, *, of: Bundle) -> None:
        """Leave the bundle `of` for the denser one; another thread than the line's may call."""
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
    """To leave a bundle for the denser one: asked for in any thread, granted in the line's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: tuple[str, Bundle] | None = None  # why, and which bundle is to be left
        self._told = False

    def ask(self, reason: str, of: Bundle) -> None:
        """Leave the bundle `of` for that reason."""
        with self._lock:
            self._asked, self._told = (reason, of), False

    def grant(self, line: "Line", offer: Callable[[str], bool]) -> None:
        """Offer it as soon as the line has room, unless the bundle was left already."""
        with self._lock:
            if self._asked is None:
                return
            reason, of = self._asked
            if line.bundle.folder != of.folder:
                self._asked = None
                text = f"no denser bundle is needed, {line.bundle.version} took over: {reason}"
                line.settlement.event("bundle", text, "info")
            elif offer(reason):
                self._asked = None
            elif not self._told:
                self._told = True
                text = f"the denser bundle waits until another one is proven: {reason}"
                line.settlement.event("bundle", text, "warning")


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
        """Nothing is installed here, but a way back may be wished."""
        if self._fallback is not None:
            opened = partial(self._opened, self._fallback)
            self._wish.grant(line, lambda reason: line.swap.offer(opened, reason))

    def fall_back(self, line: "Line", reason: str, *, of: Bundle) -> None:
        """Go over to the bundle that the rules name, until the next start."""
        if self._fallback is None:
            line.settlement.event("bundle", _NO_DENSE, "alarm")
        elif of.folder != self._fallback:  # the denser one may see the drift too
            self._wish.ask(reason, of)

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
