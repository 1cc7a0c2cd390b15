"""Another bundle for a line that runs: opened and proven beside it, taken over between two frames.

Whatever reads a disk or takes time is done in the thread that proves the bundle, or in the one that
notes the change afterwards; what is left for the line's own thread is to go over to it.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import LpvitEdgeError
from lpvit_edge.golden import GoldenFrame, unpack
from lpvit_edge.line.config import LineConfig
from lpvit_edge.line.guarded import GuardedThread, in_words
from lpvit_edge.line.records import Severity
from lpvit_edge.line.verdict import refuse_unknown_labels
from lpvit_edge.proof import load_bundle_engine, proven_engine

if TYPE_CHECKING:
    from lpvit_engines import Engine

_LAST_S = 5.0  # for a thread that still works when the line ends


def nothing() -> None:
    """There is nothing to be done."""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose engine is open and has answered the golden frames."""

    bundle: Bundle
    engine: "Engine"
    golden: tuple[tuple[GoldenFrame, bytes], ...]
    why: str
    show: Callable[[], None]  # called by the line as it goes over
    taken: Callable[[], None]  # called afterwards, in a thread of its own


class Swap:
    """One offer at a time, from its beginning until the line has taken it or it was refused."""

    def __init__(self, config: LineConfig, event: Callable[[str, str, Severity], None]) -> None:
        self._config = config
        self._event = event
        # Reads what others show of a bundle, in the thread that proves it; gives Ready.show.
        self.prepare: Callable[[Bundle], Callable[[], None]] = lambda bundle: nothing
        self._lock = threading.Lock()
        self._busy = False
        self._ready: Ready | None = None
        self._working: threading.Thread | None = None
        self._noting: threading.Thread | None = None
        self._closed = False

    def load(self, bundle: Bundle) -> "Engine":
        """The bundle's engine, or the one that line.toml names."""
        return load_bundle_engine(bundle, engine=self._config.engine, threads=self._config.threads)

    def offer(
        self,
        opened: Callable[[], Bundle],
        why: str,
        *,
        taken: Callable[[], None] = nothing,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> bool:
        """Open and prove a bundle in a thread of its own; False while another one is under way."""
        with self._lock:
            if self._closed or self._busy:
                return False
            self._busy = True
            self._working = threading.Thread(
                target=self._prove, args=(opened, why, taken, refused), name="swap", daemon=True
            )
            self._working.start()
            return True

    def _prove(
        self,
        opened: Callable[[], Bundle],
        why: str,
        taken: Callable[[], None],
        refused: Callable[[str], None],
    ) -> None:
        try:
            ready = self._proven(opened(), why, taken)
        except Exception as error:  # a library's own too: who offered it must hear of it
            text = str(error) if isinstance(error, LpvitEdgeError) else in_words(error)
            self._event("bundle", f"not taken over ({why}): {text}", "alarm")
            try:
                refused(text)
            finally:
                with self._lock:
                    self._busy = False
            return
        with self._lock:
            unwanted = self._closed
            if not unwanted:
                self._ready = ready
        if unwanted:
            ready.engine.close()

    def _proven(self, bundle: Bundle, why: str, taken: Callable[[], None]) -> Ready:
        refuse_unknown_labels(self._config.verdict, bundle.labels)
        golden, show = unpack(bundle.path("golden.zip")), self.prepare(bundle)
        engine = proven_engine(bundle, engine=self._config.engine, threads=self._config.threads)
        return Ready(
            bundle=bundle, engine=engine, golden=golden, why=why, show=show, taken=taken
        )  # fmt: skip

    def take(self) -> Ready | None:
        """What is ready, once."""
        with self._lock:
            ready, self._ready = self._ready, None
            if ready is not None:
                self._busy = False
            return ready

    def took(self, ready: Ready, before: "Engine | None") -> None:
        """The line runs it: closing the engine before it and noting the change may take time."""

        def note() -> None:
            try:
                if before is not None:
                    before.close()
            finally:
                ready.taken()

        self._noting = GuardedThread(
            note,
            name="swap noted",
            failed=lambda text: self._event("bundle", f"after the change: {text}", "alarm"),
        )
        self._noting.start()

    def close(self) -> None:
        """Take no more; a bundle that nobody took is closed."""
        with self._lock:
            self._closed = True
            ready, self._ready = self._ready, None
        if ready is not None:
            ready.engine.close()
        for thread in (self._working, self._noting):
            if thread is not None:
                thread.join(_LAST_S)
