"""Power from a tegrastats of our own: a child process, read by a thread.

The thread stamps each line when it arrives, because tegrastats asked for 500 ms was seen to
deliver 522 ms. A child that dies or falls silent is started again once. Only our own child is
ever stopped: `tegrastats --stop` would stop somebody else's as well.
"""

import subprocess
import threading
import time
from typing import IO

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers.base import Conditions, PowerSample, Quality, SourceInfo
from lpvit_profilers.tegrastats import TegrastatsLine, parse_line
from lpvit_profilers.totals import THOR_MODULE, TotalRule, total_rule, why_no_total

# Shorter intervals are not known to work on every release.
SHORTEST_INTERVAL_MS = 100
_LONGEST_LINE = 16_384
# The first line may be late: the process starts, and the first reading is thrown away.
_START_S = 3.0


class TegrastatsSource:
    """The latest line of a running tegrastats; `sample` waits for one only at the start."""

    def __init__(
        self, executable: str = "tegrastats", *, interval_ms: int = 200, start_s: float = _START_S
    ) -> None:
        if interval_ms < SHORTEST_INTERVAL_MS:
            raise ValueError(
                f"interval_ms is {interval_ms}; tegrastats is used from {SHORTEST_INTERVAL_MS} on"
            )
        self._executable = executable
        self._interval_ms = interval_ms
        self._start_s = start_s
        self._reader: _Reader | None = None
        self._restarts_left = 1
        self._rule: TotalRule | None = None
        self._info: SourceInfo | None = None

    @property
    def info(self) -> SourceInfo:
        assert self._info is not None, "the source is not open"
        return self._info

    @property
    def child_pid(self) -> int | None:
        return self._reader.pid if self._reader else None

    def open(self) -> None:
        """Start tegrastats and wait for its first line that can be used."""
        self._restarts_left = 1
        self._reader = self._start()
        latest = self._reader.wait(self._start_s)
        if latest is None and self._restart():
            latest = self._reader.wait(self._start_s)
        rule = total_rule(latest[1].rails_mw) if latest else None
        if latest is None or rule is None:
            self.close()
            raise EnvironmentUnfitError(_why_useless(self._executable, latest, self._start_s))
        self._rule = rule
        self._info = _describe(self._executable, rule, latest[1], self._interval_ms)

    def sample(self) -> PowerSample:
        """The latest line; a total of None once tegrastats is silent and was restarted in vain."""
        assert self._reader is not None, "the source is not open"
        assert self._rule is not None, "the source is not open"
        now_ns = time.monotonic_ns()
        latest = self._reader.latest
        if latest is not None and now_ns - latest[0] <= self._patience_ns:
            return _sample_of(latest[0], latest[1], self._rule)
        silent = self._reader.is_dead or now_ns - self._reader.started_ns > self._patience_ns
        if silent and self._restart():
            fresh = self._reader.wait(self._start_s)
            if fresh is not None:
                return _sample_of(fresh[0], fresh[1], self._rule)
        return PowerSample(
            t_ns=time.monotonic_ns(),
            rails_mw={},
            total_mw=None,
            quality="unavailable",
            reason=f"{self._executable} {'ended' if self._reader.is_dead else 'is silent'}; it was "
            "restarted once; run it by hand to see why",
        )

    def conditions(self) -> Conditions:
        latest = self._reader.latest if self._reader else None
        if latest is None:
            return Conditions()
        line = latest[1]
        return Conditions(
            temperature_c=max(line.temperatures_c.values(), default=None),
            clock_mhz=line.gpu_clock_mhz,
        )

    def close(self) -> None:
        if self._reader:
            self._reader.stop()
        self._reader = None
        self._info = None

    @property
    def _patience_ns(self) -> int:
        """Three intervals without a line mean that the child hangs."""
        return 3 * self._interval_ms * 1_000_000

    def _start(self) -> "_Reader":
        try:
            return _Reader([self._executable, "--interval", str(self._interval_ms)])
        except OSError as error:
            raise EnvironmentUnfitError(
                f"cannot start {self._executable}: {error.strerror}; it belongs to Jetson Linux, "
                "in a container it has to be mounted"
            ) from error

    def _restart(self) -> bool:
        if self._restarts_left == 0 or self._reader is None:
            return False
        self._restarts_left -= 1
        self._reader.stop()
        try:
            self._reader = self._start()
        except EnvironmentUnfitError:  # it was there a moment ago; the caller says that it ended
            return False
        return True


class _Reader:
    """One child and the thread that empties its pipe, so that it never blocks on a full one."""

    def __init__(self, arguments: list[str]) -> None:
        self._child = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.started_ns = time.monotonic_ns()
        self.latest: tuple[int, TegrastatsLine] | None = None
        self._arrived = threading.Event()
        self._ended = threading.Event()
        assert self._child.stdout is not None
        self._thread = threading.Thread(
            target=self._read, args=(self._child.stdout,), name="tegrastats", daemon=True
        )
        self._thread.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def is_dead(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> tuple[int, TegrastatsLine] | None:
        """The latest line with rails, waiting for the first one; None when none comes."""
        self._arrived.wait(timeout_s)
        return self.latest

    def stop(self) -> None:
        """End the child, and only it, by the handle we hold."""
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(1.0)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._thread.join(1.0)
        if self._child.stdout and not self._thread.is_alive():
            self._child.stdout.close()

    def _read(self, pipe: IO[bytes]) -> None:
        lines = 0
        while raw := pipe.readline(_LONGEST_LINE):
            t_ns = time.monotonic_ns()
            line = parse_line(raw.decode("utf-8", "replace"))
            lines += bool(line.rails_mw)
            # The first reading is thrown away: Thor's VIN is 0 in it.
            if line.rails_mw and lines > 1:
                self.latest = (t_ns, line)
                self._arrived.set()
        self._ended.set()
        self._arrived.set()


def _why_useless(executable: str, latest: tuple[int, TegrastatsLine] | None, start_s: float) -> str:
    if latest is None:
        return (
            f"{executable} printed no power rails within {start_s:g} s; some boards print them "
            "only for root, and some modes print none"
        )
    names = ", ".join(latest[1].rails_mw)
    return (
        f"{executable} prints the rails {names}, which hold no total that is known; adding them "
        "up could count power twice"
    )


def _describe(
    executable: str, rule: TotalRule, line: TegrastatsLine, interval_ms: int
) -> SourceInfo:
    return SourceInfo(
        name="tegrastats",
        sensor=executable,
        scope=rule.scope,
        quality=rule.quality,
        total_rule=rule.text,
        rails=tuple(line.rails_mw),
        resolution_mw=None,  # the line does not tell the shunt
        period_s=interval_ms / 1000,
        averaging_s=0.0011,  # one conversion of the INA3221 behind it
        has_counter=False,
        gain_class=None,
    )


def _sample_of(t_ns: int, line: TegrastatsLine, rule: TotalRule) -> PowerSample:
    total_mw = rule.total_mw(line.rails_mw)
    quality: Quality = "suspect" if line.suspect else rule.quality
    return PowerSample(
        t_ns=t_ns,
        rails_mw=line.rails_mw,
        total_mw=total_mw,
        quality="unavailable" if total_mw is None else quality,
        module_mw=THOR_MODULE.total_mw(line.rails_mw) if "VIN" in line.rails_mw else None,
        reason=why_no_total(rule, is_suspect=line.suspect, has_total=total_mw is not None),
    )
