"""What tests of sinks share: verdicts, and a clock that is turned by hand."""

import threading
import time
from typing import Literal

from lpvit_edge.line.records import FrameRecord, StageLatency


def frame(
    number: int,
    verdict: Literal["ok", "reject", "safe"] = "ok",
    *,
    age_s: float = 0.0,
    untimed: bool = False,
    probabilities: tuple[float, ...] = (),
) -> FrameRecord:
    """A verdict on a part that was triggered so long ago."""
    return FrameRecord(
        number=number, source="s", captured_at=time.time() - age_s,
        captured_ns=time.monotonic_ns() - int(age_s * 1e9),
        verdict=verdict, action="pass" if verdict == "ok" else "reject",
        confidence=max(probabilities, default=None), probabilities=probabilities,
        untimed=untimed, latency=StageLatency(total_ms=1.0),
    )  # fmt: skip


class TurnedClock:
    """Stands still, or runs with the machine's, and can be turned on."""

    def __init__(self, *, runs: bool = False) -> None:
        self._runs = runs
        self._turned_ns = 0

    def turn(self, seconds: float) -> None:
        self._turned_ns += int(seconds * 1e9)

    def monotonic_ns(self) -> int:
        return self._turned_ns + (time.monotonic_ns() if self._runs else 0)

    def unix_s(self) -> float:
        return self.monotonic_ns() / 1e9

    def wait(self, event: threading.Event, seconds: float) -> bool:
        return event.wait(seconds)
