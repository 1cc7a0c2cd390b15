"""What the frames of a line add up to. Pure bookkeeping, without threads and without clocks."""

from bisect import bisect_left
from collections import Counter, deque
from copy import copy
from typing import TYPE_CHECKING

import numpy as np

from lpvit_edge.dashboard.snapshot import BUCKETS_S, FramesNow, LatencyNow

if TYPE_CHECKING:
    from lpvit_edge.line.records import FrameRecord

_RECENT = 4096
_LEAST_FOR_P999 = 1000
_RATE_S = 10.0
_MOST_LABELS = 64
STAGES = ("capture", "wait", "preprocess", "infer")


class FrameCounters:
    """Counts frames and keeps the latencies of the recent ones."""

    def __init__(self) -> None:
        self.total = 0
        self._verdicts: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        self._recent: deque[tuple[float, ...]] = deque(maxlen=_RECENT)
        self._times_s: deque[float] = deque(maxlen=_RECENT)
        self._buckets = [0] * len(BUCKETS_S)
        self._count, self._sum_s = 0, 0.0

    def add(self, record: "FrameRecord", *, at_s: float) -> None:
        """One frame, decided at `at_s` on a monotonic clock."""
        self.total += 1
        self._verdicts[record.verdict] += 1
        if record.label is not None and (
            record.label in self._labels or len(self._labels) < _MOST_LABELS
        ):
            self._labels[record.label] += 1
        self._times_s.append(at_s)
        if record.untimed:  # of which nobody knows when it came
            return
        latency = record.latency
        stages = (latency.capture_ms, latency.wait_ms, latency.preprocess_ms, latency.infer_ms)
        self._recent.append((latency.total_ms, *(np.nan if ms is None else ms for ms in stages)))
        self._bucket(latency.total_ms / 1000)

    def copy(self) -> "FrameCounters":
        """What was counted so far, to be worked on while counting goes on."""
        found = FrameCounters()
        found.__dict__ = {name: copy(value) for name, value in self.__dict__.items()}
        return found

    def frames(self, *, now_s: float, dropped: int) -> FramesNow:
        return FramesNow(
            total=self.total,
            per_s=self._rate(now_s),
            dropped=dropped,
            verdicts=dict(self._verdicts),
            labels=dict(self._labels),
            age_s=now_s - self._times_s[-1] if self._times_s else None,
        )

    def latency(self) -> LatencyNow | None:
        """Percentiles of the recent frames; None before the first."""
        if not self._recent:
            return None
        recent = np.array(self._recent)
        p50, p99, p999 = np.percentile(recent[:, 0], (50, 99, 99.9))
        reached = {
            name: float(np.nanmedian(recent[:, index]))
            for index, name in enumerate(STAGES, start=1)
            if np.isfinite(recent[:, index]).any()
        }
        return LatencyNow(
            frames=len(recent),
            p50_ms=float(p50),
            p99_ms=float(p99),
            p999_ms=float(p999) if len(recent) >= _LEAST_FOR_P999 else None,
            stages_p50_ms=reached,
            buckets=tuple(np.cumsum(self._buckets).tolist()),
            count=self._count,
            sum_s=self._sum_s,
        )

    def _bucket(self, seconds: float) -> None:
        place = bisect_left(BUCKETS_S, seconds)
        if place < len(BUCKETS_S):
            self._buckets[place] += 1
        self._count += 1
        self._sum_s += seconds

    def _rate(self, now_s: float) -> float:
        """Frames a second over the last ten seconds, or over the time since the first frame."""
        recent = [t for t in self._times_s if t > now_s - _RATE_S]
        if not recent:
            return 0.0
        full = len(self._times_s) == _RECENT and len(recent) == _RECENT
        begin_s = recent[0] if full or len(recent) == len(self._times_s) else now_s - _RATE_S
        return len(recent) / max(now_s - begin_s, 1.0)
