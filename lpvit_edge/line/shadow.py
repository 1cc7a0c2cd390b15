"""The dense engine beside the line: a share of the frames, judged twice, and never waited for.

The line's thread puts a frame into a short queue or counts that it had no room. A thread of its own
hands it to a process of the lowest priority, waits for the answer at most so long, and kills a
process that hangs. Which verdict the part got is not touched by any of it.
"""

import contextlib
import os
import queue
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.bundle import Bundle
from lpvit_edge.dashboard.snapshot import ShadowNow
from lpvit_edge.line.records import FrameRecord, Severity
from lpvit_edge.line.shadow_process import LENGTHS, ShadowOrders, receive_answer
from lpvit_edge.line.shadow_rule import ShadowRule
from lpvit_edge.line.verdict import VerdictRule, judge, refuse_unknown_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGEST_REST_S = 60.0
_NONE = ShadowNow(compared=0, agreed=0, escapes=0, overkills=0, other=0, dropped=0, failed=0)


class _Job(msgspec.Struct, frozen=True):
    record: FrameRecord
    pixels: "NDArray[np.uint8]"


class Shadow:
    """A context manager that owns its thread and its process."""

    def __init__(
        self,
        bundle: Bundle,
        rule: ShadowRule,
        verdict: VerdictRule,
        *,
        event: Callable[[str, str, Severity], None] = lambda kind, text, severity: None,
        command: tuple[str, ...] = (sys.executable, "-m", "lpvit_edge.line.shadow_process"),
        seed: int = 0,
    ) -> None:
        """Raises UnknownOptionError where the bundle lacks labels that the verdict rule names."""
        refuse_unknown_labels(verdict, bundle.labels)
        self._bundle = bundle
        self._rule = rule
        self._verdict = verdict
        self.event = event
        self._command = command
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._counts, self._of = _NONE, ""  # the bundle that is compared
        self._queue: queue.Queue[_Job] = queue.Queue(rule.queue)
        self._stop = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)

    def __enter__(self) -> "Shadow":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        process = self._process
        if process is not None:
            process.kill()  # ends a wait for its answer at once
        self._thread.join(10.0)
        self._end_process()

    def offer(self, record: FrameRecord, pixels: "NDArray[np.uint8] | None") -> None:
        """A decided frame, from the line's own thread; returns at once."""
        if pixels is None or not record.probabilities or record.bundle == self._bundle.version:
            return
        if self._random.random() >= self._rule.share:
            return
        with self._lock:
            if record.bundle != self._of:  # another one took over: its agreement is its own
                self._counts, self._of = _NONE, record.bundle
        try:
            self._queue.put_nowait(_Job(record, pixels))
        except queue.Full:
            self._count(record, "dropped")

    def now(self) -> ShadowNow:
        """What was compared so far, of the bundle that was compared last."""
        with self._lock:
            return self._counts

    def _work(self) -> None:
        rest_s = 0.5
        while not self._stop.is_set():
            try:
                job = self._queue.get(timeout=0.1)
            except queue.Empty:
                continue
            problem = self._compare(job)
            if problem is None:
                rest_s = 0.5
                continue
            if self._stop.is_set():
                return
            self._count(job.record, "failed")
            self._complain(problem)
            self._end_process()
            self._stop.wait(rest_s)  # meanwhile the queue fills and frames are dropped, counted
            rest_s = min(2 * rest_s, _LONGEST_REST_S)

    def _compare(self, job: _Job) -> str | None:
        """Judge a frame a second time; what went wrong, or None."""
        try:
            channel = self._channel or self._start_process()
            channel.sendall(LENGTHS.pack(*job.pixels.shape))
            channel.sendall(np.ascontiguousarray(job.pixels).tobytes())
            answer = receive_answer(channel)
        except TimeoutError:
            return f"no answer within {self._rule.timeout_s:g} s; its process was killed"
        except (EOFError, OSError, msgspec.DecodeError) as error:
            return f"its process ended ({error or type(error).__name__})"
        if answer.problem is not None:
            return answer.problem
        if len(answer.probabilities) != len(self._bundle.labels):
            return f"{len(answer.probabilities)} classes in place of {len(self._bundle.labels)}"
        found = judge(np.array(answer.probabilities), self._bundle.labels, self._verdict)
        self._count(job.record, _result(job.record, found.verdict, found.label), compared=True)
        return None

    def _start_process(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            orders = ShadowOrders(
                bundle=str(Path(self._bundle.folder).resolve()),
                engine=None,
                threads=self._rule.threads,
                channel=theirs.fileno(),
                parent=os.getpid(),
            )
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=2,  # what an engine's library prints is no result of the line
                pass_fds=(theirs.fileno(),),
            )
        self._process, self._channel = process, ours
        ours.settimeout(self._rule.timeout_s)
        assert process.stdin is not None
        with process.stdin as stdin, contextlib.suppress(BrokenPipeError):
            stdin.write(msgspec.json.encode(orders) + b"\n")
        return ours

    def _end_process(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._channel = self._process = None

    def _complain(self, problem: str) -> None:
        """Say a problem once, until it is another one."""
        text = f"the dense engine did not answer: {problem}"[:500]
        with self._lock:
            is_new = self._counts.reason != text
            self._counts = msgspec.structs.replace(self._counts, reason=text)
        if is_new:
            self.event("shadow", text, "warning")

    def _count(self, record: FrameRecord, result: str, *, compared: bool = False) -> None:
        with self._lock:
            if record.bundle != self._of:
                return
            more = {result: getattr(self._counts, result) + 1}
            if compared:
                more["compared"] = self._counts.compared + 1
            self._counts = msgspec.structs.replace(self._counts, **more)


def _result(record: FrameRecord, verdict: str, label: str) -> str:
    """Escape: the line passed what the dense engine rejects; overkill: the other way round."""
    if record.verdict != verdict:
        return "escapes" if record.verdict == "ok" else "overkills"
    return "agreed" if record.label == label else "other"
