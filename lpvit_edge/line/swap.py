"""Another bundle for a line that runs: proven beside it, taken over between two frames."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import LpvitEdgeError
from lpvit_edge.line.config import LineConfig
from lpvit_edge.line.guarded import GuardedThread, in_words
from lpvit_edge.line.records import Severity
from lpvit_edge.line.verdict import refuse_unknown_labels
from lpvit_edge.proof import load_bundle_engine, proven_engine

if TYPE_CHECKING:
    from lpvit_engines import Engine


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose engine is open and has answered the golden frames."""

    bundle: Bundle
    engine: "Engine"
    why: str
    taken: Callable[[], None]  # called by the line once it runs


class Swap:
    """One offer at a time; a newer one replaces an older that nobody took yet."""

    def __init__(self, config: LineConfig, event: Callable[[str, str, Severity], None]) -> None:
        self._config = config
        self._event = event
        self._lock = threading.Lock()
        self._ready: Ready | None = None
        self._working: threading.Thread | None = None
        self._noting: threading.Thread | None = None
        self._closed = False

    def load(self, bundle: Bundle) -> "Engine":
        """The bundle's engine, or the one that line.toml names."""
        return load_bundle_engine(bundle, engine=self._config.engine, threads=self._config.threads)

    def offer(
        self,
        bundle: Bundle,
        why: str,
        *,
        taken: Callable[[], None] = lambda: None,
        refused: Callable[[str], None] = lambda reason: None,
    ) -> bool:
        """Prove a bundle in a thread of its own; False while another one is being proven."""
        with self._lock:
            if self._closed or (self._working is not None and self._working.is_alive()):
                return False
            self._working = threading.Thread(
                target=self._prove, args=(bundle, why, taken, refused), name="swap", daemon=True
            )
            self._working.start()
            return True

    def _prove(
        self,
        bundle: Bundle,
        why: str,
        taken: Callable[[], None],
        refused: Callable[[str], None],
    ) -> None:
        try:
            refuse_unknown_labels(self._config.verdict, bundle.labels)
            engine = proven_engine(bundle, engine=self._config.engine, threads=self._config.threads)
        except Exception as error:  # a library's own too: who offered it must hear of it
            text = str(error) if isinstance(error, LpvitEdgeError) else in_words(error)
            self._event("bundle", f"{bundle.version} not taken over: {text}", "alarm")
            refused(text)
            return
        unwanted: Engine | None = engine
        with self._lock:
            if not self._closed:
                unwanted = None if self._ready is None else self._ready.engine
                self._ready = Ready(bundle=bundle, engine=engine, why=why, taken=taken)
        if unwanted is not None:
            unwanted.close()

    def take(self) -> Ready | None:
        """What is ready, once."""
        with self._lock:
            ready, self._ready = self._ready, None
            return ready

    def took(self, ready: Ready) -> None:
        """The line runs it: what is to be noted then may wait for a disk, and the line may not."""
        noting = GuardedThread(
            ready.taken,
            name="swap noted",
            failed=lambda text: self._event("bundle", f"the change was not noted: {text}", "alarm"),
        )
        self._noting = noting
        noting.start()

    def close(self) -> None:
        """Take no more; a bundle that nobody took is closed."""
        with self._lock:
            self._closed = True
            ready, self._ready = self._ready, None
        if ready is not None:
            ready.engine.close()
        for thread in (self._working, self._noting):
            if thread is not None:
                thread.join(30.0)
