"""The process that a camera's driver may wedge in: python -m lpvit_edge.line.capture_process.

It reads its orders from stdin (so that no password stands in a process list), opens the source,
numbers every frame and hands it over; a source that is lost is opened again, ever less often. It
ends with the process that started it.
"""

import ctypes
import os
import signal
import socket
import sys
import time

import msgspec

from lpvit_edge.errors import LpvitEdgeError, MissingDependencyError
from lpvit_edge.line.config import SourceConfig
from lpvit_edge.line.frames import Captured
from lpvit_edge.line.policy import OVERFLOW, PolicyName
from lpvit_edge.line.redact import redacted
from lpvit_edge.line.ring import FrameMessage, RingWriter, StatusMessage
from lpvit_edge.line.sequence import SequenceFile
from lpvit_edge.line.sources.base import EndOfSource, Source

BEAT_S = 0.25  # how often it says that it lives
_LONGEST_WAIT_S = 10.0
MOST_MISSED = 10_000  # triggers in one gap that get a verdict each
_LAST_OF_GIGE = 65535  # GigE Vision 1 numbers its blocks with 16 bits and leaves 0 out
_PR_SET_PDEATHSIG = 1


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What the capture process is told."""

    source: SourceConfig
    policy: PolicyName
    sequence: str  # path
    memory: int  # file descriptors
    channel: int
    parent: int


class Capture:
    """Numbers frames and hands them over."""

    def __init__(self, ring: RingWriter, sequence: SequenceFile, policy: PolicyName) -> None:
        self._ring = ring
        self._sequence = sequence
        self._policy = policy
        self._dropped = 0

    def status(self, state: str, text: str = "") -> None:
        """Say how the source is."""
        fields = {"state": state, "text": text, "dropped": self._dropped}
        self._ring.send(msgspec.convert(fields, StatusMessage))

    def run(self, source: Source) -> None:
        """Hand frames over until the source ends (EndOfSource) or is lost (SourceError)."""
        beat_s = 0.0
        while True:
            captured = source.read(BEAT_S)
            if captured is not None:
                self.hand_over(captured)
            if time.monotonic() - beat_s > BEAT_S:
                beat_s = time.monotonic()
                self.status("live")

    def hand_over(self, captured: Captured) -> None:
        """Number a frame, after the triggers that the camera counted and nobody saw."""
        self._count_missed(captured)
        if self._policy == "wait":
            while not self._ring.is_free(BEAT_S):
                self.status("live")
        if captured.pixels is not None and not self._ring.is_free(0.0):
            if self._policy == "newest":
                self._dropped += 1
                return
            captured = msgspec.structs.replace(captured, pixels=None, fault=OVERFLOW)
        message = FrameMessage(
            number=self._sequence.next(),
            captured_at=captured.captured_at,
            captured_ns=captured.captured_ns,
            name=captured.name,
            lost=captured.fault,
        )
        if captured.pixels is None:
            self._ring.send(message)
        else:
            self._ring.write(captured.pixels, message)

    def _count_missed(self, captured: Captured) -> None:
        counter, before = captured.counter, self._sequence.counter
        if counter is None:
            return
        self._sequence.note_counter(counter)
        wrapped = (before, counter) == (_LAST_OF_GIGE, 1)
        if before is None or counter == before + 1 or wrapped:
            return
        missed = counter - before - 1
        if missed < 0:
            self.status(
                "gap", f"the camera counts anew from {counter}; what it missed is not known"
            )
            return
        which = f"{before + 1} to {counter - 1}" if missed > 1 else f"{before + 1}"
        what = "triggers were" if missed > 1 else "trigger was"
        self.status("gap", f"{missed} {what} never seen ({which})")
        if self._policy != "triggered":
            return
        for _ in range(min(missed, MOST_MISSED)):
            self._ring.send(
                FrameMessage(
                    number=self._sequence.next(),
                    captured_at=captured.captured_at,
                    captured_ns=captured.captured_ns,
                    lost="trigger was never seen",
                    untimed=True,
                )
            )


def main() -> int:
    """Obey the orders on stdin until the source ends or the parent does."""
    orders = msgspec.json.decode(sys.stdin.buffer.readline(), type=Orders)
    die_with(orders.parent)
    channel = socket.socket(fileno=orders.channel)
    ring = RingWriter(orders.memory, channel)
    from pathlib import Path

    from lpvit_edge.line.sources import open_source

    with SequenceFile(Path(orders.sequence)) as sequence:
        capture = Capture(ring, sequence, orders.policy)
        wait_s = 0.5
        while True:
            opened_s = time.monotonic()
            try:
                capture.status("opening")
                source = open_source(orders.source)
                try:
                    capture.status("live", "open")
                    capture.run(source)
                finally:
                    source.close()
            except EndOfSource:
                capture.status("ended")
                return 0
            except MissingDependencyError as error:
                capture.status("fatal", str(error))
                return error.exit_code
            except (LpvitEdgeError, OSError) as error:  # OSError: the camera's own code, or below
                wait_s = 0.5 if time.monotonic() - opened_s > 10.0 else wait_s
                if not _has_rested(capture, redacted(str(error)), wait_s):
                    return 0
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _has_rested(capture: Capture, text: str, seconds: float) -> bool:
    """Wait before the next attempt, and keep saying that the process lives.

    False where nobody hears it: the other end of the channel is gone.
    """
    end_s = time.monotonic() + seconds
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            capture.status("lost", text)
        except OSError:
            return False
        time.sleep(min(left_s, BEAT_S))
    return True


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(0)


if __name__ == "__main__":
    raise SystemExit(main())
