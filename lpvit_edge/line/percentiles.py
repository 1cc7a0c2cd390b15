"""Percentiles of an endless stream in bounded memory.

Counts in buckets whose edges grow by 2 %, as in an HDR histogram: a percentile is the upper edge of
its bucket, so it is at most 2 % too high and never too low.
"""

import math

_GROWTH = 1.02
_SMALLEST_MS = 1e-3
_BUCKETS = 1 + math.ceil(math.log(1e9) / math.log(_GROWTH))  # 1 µs to 1000 s


class LatencyHistogram:
    """Latencies in milliseconds."""

    def __init__(self) -> None:
        self._counts = [0] * _BUCKETS
        self.count = 0
        self.largest_ms = 0.0

    def add(self, latency_ms: float) -> None:
        """Count one latency; clipped to 1 µs .. 1000 s."""
        self._counts[_bucket(latency_ms)] += 1
        self.count += 1
        self.largest_ms = max(self.largest_ms, latency_ms)

    def percentile_ms(self, percent: float) -> float | None:
        """The latency that `percent` of all stay at or below; None before the first."""
        if not self.count:
            return None
        wanted = math.ceil(self.count * percent / 100.0)
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= max(1, wanted):
                return min(self.largest_ms, _SMALLEST_MS * _GROWTH**index)
        return self.largest_ms


def _bucket(latency_ms: float) -> int:
    if latency_ms <= _SMALLEST_MS:
        return 0
    index = math.ceil(math.log(latency_ms / _SMALLEST_MS) / math.log(_GROWTH))
    return min(index, _BUCKETS - 1)
