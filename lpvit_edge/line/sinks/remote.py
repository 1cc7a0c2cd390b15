"""From the journal over a wire: in order, again and again until it has arrived."""

import contextlib
import threading
from typing import TYPE_CHECKING

from lpvit_edge.errors import SinkError
from lpvit_edge.line.clock import Clock, SystemClock
from lpvit_edge.line.guarded import GuardedThread, in_words
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.records import FrameRecord
from lpvit_edge.line.sinks.base import Remote

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIRST_WAIT_S = 0.2
_BEAT_S = 0.25
_DROPPED = 500  # entries looked through at once


class RemoteSink:
    """Reads the journal behind its cursor, which moves when the other side has taken an entry.

    At least once: after a kill -9 the last entries may be sent again. Each carries its frame's
    number, by which the other side can tell.
    """

    def __init__(
        self,
        remote: Remote,
        journal: Journal,
        *,
        is_held: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.name = remote.name
        self._remote = remote
        self._journal = journal
        self._clock = clock or SystemClock()
        self._cursor = journal.delivered(remote.name)
        journal.set_delivered(self.name, self._cursor)  # from here on the journal keeps it
        self._newest = journal.last_id()  # what comes later is of this run
        self._has_resumed = False
        self._closing = threading.Event()
        self._give_up = threading.Event()
        self._is_held = self._told_held = is_held
        self._beaten_s = float("-inf")
        self.error: str | None = None
        self.thread = GuardedThread(self._run, name=self.name, failed=self._note)
        self.thread.start()

    @property
    def missed(self) -> int:
        """Verdicts that were too old to be told, or waited until the journal had to let them go."""
        return self._remote.missed + self._journal.given_up(self.name)

    def deliver(self, record: FrameRecord, pixels: "NDArray[np.uint8] | None") -> None:
        """Nothing: the journal has it."""

    def hold(self, is_held: bool) -> None:
        """Told to the other side with its next heartbeat."""
        self._is_held = is_held

    def close(self, timeout_s: float) -> int:
        """Send what waits; what does not arrive in time stays in the journal."""
        self._closing.set()
        self.thread.join(timeout_s)
        self._give_up.set()
        self.thread.join(2.0)
        return self._journal.last_id() - self._cursor

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._give_up.is_set():
            was_closing = self._closing.is_set()  # before the look, so that no late entry is missed
            try:
                sent = self._send_some()
                self.error, wait_s = None, _FIRST_WAIT_S
            except Exception as error:  # a library's own too: verdicts must go on to be told
                self._note(str(error) if isinstance(error, SinkError) else in_words(error))
                self._recover()
                self._clock.wait(self._give_up, wait_s)
                wait_s = min(2 * wait_s, self._remote.longest_wait_s)
                continue
            if not sent and was_closing:
                break
        with contextlib.suppress(SinkError):
            self._remote.disconnect()

    def _note(self, text: str) -> None:
        self.error = text if text.startswith(self.name) else f"{self.name}: {text}"

    def _recover(self) -> None:
        """Let go of what failed; the next attempt begins anew."""
        self._beaten_s = float("-inf")
        for step in (self._remote.disconnect, self._drop_old):
            try:
                step()
            except Exception as error:
                self._note(f"{self.error}; then {in_words(error)}")

    def _send_some(self) -> bool:
        """Send the next entries; False when there were none."""
        self._resume()
        self._beat()
        entries = self._journal.after(self._cursor, limit=self._remote.batch)
        if not entries:
            if not self._closing.is_set():
                self._journal.wait_after(self._cursor, _BEAT_S)
            return False
        self._remote.send(entries)
        self._cursor = entries[-1].id
        self._journal.set_delivered(self.name, self._cursor)
        return True

    def _resume(self) -> None:
        """In the thread too: a file may be away, as a broker may."""
        if not self._has_resumed:
            self._cursor = self._remote.resume(self._cursor, self._newest)
            self._journal.set_delivered(self.name, self._cursor)
            self._has_resumed = True

    def _drop_old(self) -> None:
        """Pass what needs not be sent any more, lest it stand before what does later on."""
        while entries := self._journal.after(self._cursor, limit=_DROPPED):
            count = self._remote.too_old(entries)
            if count:
                self._cursor = entries[count - 1].id
                self._journal.set_delivered(self.name, self._cursor)
            if count < len(entries):
                return

    def _beat(self) -> None:
        """Tell the other side that we live; under load too, where entries never cease."""
        now_s = self._clock.monotonic_ns() / 1e9
        if now_s - self._beaten_s >= _BEAT_S or self._is_held != self._told_held:
            held = self._is_held
            self._remote.beat(is_held=held)
            self._beaten_s, self._told_held = now_s, held
