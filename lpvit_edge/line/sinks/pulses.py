"""When a reject line is active: pulses at given times, as pure arithmetic on CLOCK_MONOTONIC."""

import heapq


class PulseTrain:
    """Pulses that are due, and the one that runs. Pulses that overlap become one longer pulse."""

    def __init__(self, *, pulse_ns: int, tolerance_ns: int) -> None:
        self._pulse_ns = pulse_ns
        self._tolerance_ns = tolerance_ns
        self._due: list[int] = []
        self._end_ns: int | None = None  # of the pulse that runs
        self.begun = 0
        self.missed = 0

    def add(self, due_ns: int) -> None:
        """A pulse is due then."""
        heapq.heappush(self._due, due_ns)

    def is_active(self, now_ns: int) -> bool:
        """Whether the line is active now; begins what is due, and gives up what is overdue.

        A pulse that could only begin after more than the tolerance would hit another part.
        """
        while self._due and self._due[0] <= now_ns:
            if now_ns - heapq.heappop(self._due) > self._tolerance_ns:
                self.missed += 1
            else:
                self.begun += 1
                self._end_ns = now_ns + self._pulse_ns
        if self._end_ns is not None and self._end_ns <= now_ns:
            self._end_ns = None
        return self._end_ns is not None

    def next_ns(self) -> int | None:
        """When something changes next; None: nothing is due."""
        times = [*self._due[:1], *([] if self._end_ns is None else [self._end_ns])]
        return min(times, default=None)

    @property
    def waiting(self) -> int:
        """Pulses that are due later."""
        return len(self._due)

    def clear(self) -> int:
        """Give up all that is due, and the pulse that runs; how many that were."""
        count = len(self._due) + (self._end_ns is not None)
        self._due, self._end_ns = [], None
        return count
