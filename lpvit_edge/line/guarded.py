"""Threads that do not die unseen: whatever ends one is kept in words, and told."""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterable

from lpvit_edge.line.records import Severity


class GuardedThread(threading.Thread):
    """A daemon thread. `failure` says which unexpected error ended it, None otherwise."""

    def __init__(
        self,
        work: Callable[[], None],
        *,
        name: str,
        failed: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._failed = failed
        self.failure: str | None = None

    def run(self) -> None:
        """Do the work; an error that nobody expected is kept, traced on stderr, and told."""
        try:
            self._work()
        except Exception as error:
            self.failure = in_words(error)
            sys.stderr.write(f"thread {self.name} ended: {self.failure}\n")
            with contextlib.suppress(Exception):  # who is told may be what is broken
                self._failed(self.failure)


def in_words(error: Exception) -> str:
    """The kind of an unexpected error and its place, without its text: that may name a secret."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return f"unexpected {type(error).__name__}"
    *folders, file = frames[-1].filename.split("/")
    place = "/".join((*folders[-1:], file))
    return f"unexpected {type(error).__name__} at {place}:{frames[-1].lineno}"


class ThreadWatch:
    """Which of a line's threads ended; each is told once."""

    def __init__(
        self,
        needed: Callable[[], Iterable[GuardedThread]],
        *,
        hold: Callable[[str], None],
        event: Callable[[str, str, Severity], None],
    ) -> None:
        """`needed` names the threads that verdicts need; hold(why) makes the outputs safe."""
        self._needed = needed
        self._hold = hold
        self._event = event
        self._told: set[str] = set()
        self.aside: dict[str, str] = {}  # those that no verdict needs, and how they ended

    def died(self) -> dict[str, str]:
        """Of the threads that verdicts need, those that ended with an error, and which."""
        threads = self._needed()
        return {thread.name: thread.failure for thread in threads if thread.failure is not None}

    def look(self) -> None:
        """Called a few times a second, and by a thread that ends, with its last breath."""
        died = self.died()
        for name in died.keys() - self._told:
            self._told.add(name)
            self._hold(f"the thread {name} ended")
            text = f"the thread {name} ended ({died[name]}); only a new start mends that"
            self._event("thread", text, "alarm")
