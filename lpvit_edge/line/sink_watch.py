"""Sinks that fail, and verdicts that one of them missed, as events in the journal."""

from collections.abc import Callable

from lpvit_edge.line.clock import Clock
from lpvit_edge.line.outputs import Outputs
from lpvit_edge.line.records import Severity

_REST_S = 10.0  # between two events about what one sink missed


class SinkWatch:
    """Looked through a few times a second; says each change once."""

    def __init__(
        self, outputs: Outputs, event: Callable[[str, str, Severity], None], clock: Clock
    ) -> None:
        self._outputs = outputs
        self._event = event
        self._clock = clock
        self._failing: set[str] = set()
        self._missed: dict[str, int] = {}
        self._told_ns: dict[str, int] = {}

    def look(self) -> None:
        """Tell what changed since the last call."""
        faults = self._outputs.faults()
        for name in faults.keys() - self._failing:
            self._event("sink", f"{faults[name]}; it is tried again", "warning")
        for name in self._failing - faults.keys():
            self._event("sink", f"{name}: takes verdicts again", "info")
        self._failing = set(faults)
        for sink in self._outputs.sinks:
            self._tell_missed(sink.name, sink.missed)

    def _tell_missed(self, name: str, missed: int) -> None:
        """Tell how many more verdicts a sink missed, with a rest after each time."""
        before = self._missed.get(name, 0)
        now_ns = self._clock.monotonic_ns()
        told_ns = self._told_ns.get(name)
        if missed == before or (told_ns is not None and now_ns - told_ns < _REST_S * 1e9):
            return
        self._missed[name], self._told_ns[name] = missed, now_ns
        self._event("sink", f"{name}: missed {missed - before} verdicts", "alarm")
