"""The capture process from outside: started, listened to, killed when it is silent, replaced."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec

from lpvit_edge.line.capture_process import MOST_MISSED, Orders
from lpvit_edge.line.config import SourceConfig
from lpvit_edge.line.feed import Health, Intake, State
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.guarded import GuardedThread
from lpvit_edge.line.policy import Policy
from lpvit_edge.line.records import Severity
from lpvit_edge.line.ring import FrameMessage, Message, RingReader, StatusMessage
from lpvit_edge.line.sequence import SequenceFile

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_PATIENCE = 6  # times stall_s, while a source is being opened


class CaptureFeed:
    """Keeps one capture process running and passes its frames on."""

    def __init__(
        self,
        config: SourceConfig,
        policy: Policy,
        intake: Intake,
        sequence_path: Path,
        *,
        stall_s: float,
    ) -> None:
        self._config = config
        self._policy = policy
        self._intake = intake
        self._path = sequence_path
        self._stall_s = stall_s
        self._stopping = threading.Event()
        self.thread = GuardedThread(self._run, name="capture")
        self._last_number = 0
        self._dropped_before = 0  # by processes that ended
        self.health = Health(since_ns=intake.clock.monotonic_ns())

    def start(self) -> None:
        """Start the process and listen."""
        self.thread.start()

    def stop(self) -> None:
        """Kill the process; frames that it handed over stay in the queue."""
        self._stopping.set()
        self.thread.join()

    def settled(self, frame: Frame) -> None:
        """A camera does not care."""

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        with SequenceFile(self._path) as sequence:
            self._last_number = sequence.taken
            while not self._stopping.is_set():
                started_ns = self._intake.clock.monotonic_ns()
                why = self._one_process()
                self._settle_lost(sequence.taken, why)
                if self.health.state == "ended" or self.health.fatal or self._stopping.is_set():
                    break
                self._become("lost", why)
                self.health.restarts += 1
                self._event("capture", f"{why}; starting it again", "alarm")
                lived_s = (self._intake.clock.monotonic_ns() - started_ns) / 1e9
                wait_s = _FIRST_WAIT_S if lived_s > 10.0 else min(2 * wait_s, _LONGEST_WAIT_S)
                self._intake.clock.wait(self._stopping, wait_s)
        self._intake.queue.close()

    def _one_process(self) -> str:
        """Run one process to its end; says how it ended."""
        memory = os.memfd_create("lpvit-frames")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader = RingReader(memory, ours)
        self._dropped_before = self.health.dropped
        try:
            with theirs:
                process = self._spawn(memory, theirs)
            self.health.process = process.pid
            try:
                return self._listen(reader, process)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
                self._drain(reader)
        finally:
            reader.close()
            ours.close()
            os.close(memory)
            self.health.process = None

    def _spawn(self, memory: int, channel: socket.socket) -> "subprocess.Popen[bytes]":
        orders = Orders(
            source=self._config,
            policy=self._policy.kind or "newest",
            sequence=str(self._path.resolve()),
            memory=memory,
            channel=channel.fileno(),
            parent=os.getpid(),
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "lpvit_edge.line.capture_process"],
            stdin=subprocess.PIPE,
            stdout=2,  # what a driver prints is no result of the line
            pass_fds=(memory, channel.fileno()),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # closing it writes
            stdin.write(msgspec.json.encode(orders) + b"\n")
        return process

    def _listen(self, reader: RingReader, process: "subprocess.Popen[bytes]") -> str:
        last_ns = self._intake.clock.monotonic_ns()
        # Loading the libraries of a first start takes a slow machine many seconds, and so does
        # opening a camera in a large network.
        limit_s = _PATIENCE * self._stall_s
        while not self._stopping.is_set():
            try:
                message = reader.receive(0.1)
            except EOFError:
                with contextlib.suppress(
                    subprocess.TimeoutExpired
                ):  # a driver that does not unload
                    process.wait(timeout=1.0)
                return f"the capture process ended ({_how(process.returncode)})"
            now_ns = self._intake.clock.monotonic_ns()
            if message is not None:
                last_ns = now_ns
                opening = isinstance(message, StatusMessage) and message.state == "opening"
                limit_s = _PATIENCE * self._stall_s if opening else self._stall_s
                self._take(reader, message)
                continue
            silent_s = (now_ns - last_ns) / 1e9
            if silent_s > limit_s:
                return f"the capture process was silent for {limit_s:g} s and was killed"
            if silent_s > self._stall_s / 2 and self.health.state == "live":
                self._become("lost", "the capture process is silent")
        return "stopped"

    def _drain(self, reader: RingReader) -> None:
        """What a process handed over before it ended still counts."""
        with contextlib.suppress(EOFError, BrokenPipeError):
            while (message := reader.receive(0.01)) is not None:
                self._take(reader, message)

    def _take(self, reader: RingReader, message: Message) -> None:
        if isinstance(message, StatusMessage):
            self._note(message)
            return
        self._last_number = message.number
        self._intake.accept(self._frame(reader, message))

    def _frame(self, reader: RingReader, message: FrameMessage) -> Frame:
        return Frame(
            number=message.number,
            captured_at=message.captured_at,
            captured_ns=message.captured_ns,
            received_ns=self._intake.clock.monotonic_ns(),
            pixels=None if message.shape is None else reader.pixels(message),
            name=message.name,
            lost=message.lost,
            untimed=message.untimed,
        )

    def _note(self, message: StatusMessage) -> None:
        self.health.dropped = self._dropped_before + message.dropped
        if message.state == "opening":
            return
        if message.state == "gap":
            self._event("gap", message.text, "alarm")
            return
        if message.state == "fatal":
            self.health.fatal = message.text
        self._become("lost" if message.state == "fatal" else message.state, message.text)

    def _become(self, state: State, text: str) -> None:
        """Note how the source is, and tell it where it is news."""
        if (state, text) == (self.health.state, self.health.text) or (
            state == "live" == self.health.state
        ):
            return
        self.health.state, self.health.text = state, text
        self.health.since_ns = self._intake.clock.monotonic_ns()
        severity: Severity = "alarm" if state == "lost" else "info"
        self._event("source", f"{state}: {text}" if text else state, severity)

    def _settle_lost(self, taken: int, why: str) -> None:
        """Frames that the process numbered and could not hand over."""
        lost = range(self._last_number + 1, taken + 1)
        if not lost or self._policy.kind != "triggered":
            self._last_number = taken
            if lost:
                self._event("gap", f"{len(lost)} frames were lost: {why}", "alarm")
            return
        now_ns = self._intake.clock.monotonic_ns()
        for number in lost[:MOST_MISSED]:
            self._intake.accept(
                Frame(
                    number=number,
                    captured_at=self._intake.clock.unix_s(),
                    captured_ns=now_ns,
                    received_ns=now_ns,
                    lost=why,
                    untimed=True,
                )
            )
        self._last_number = taken
        self._event("gap", f"{len(lost)} frames were lost: {why}", "alarm")

    def _event(self, kind: str, text: str, severity: Severity) -> None:
        self._intake.settlement.event(kind, text, severity)


def _how(code: int | None) -> str:
    if code is None:
        return "closed its channel"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
