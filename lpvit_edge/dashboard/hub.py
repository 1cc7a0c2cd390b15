"""Where a line reports to: it counts, watches for drift, and answers what is known now.

The line's own thread only puts a frame into a bounded queue; counting is cheap enough to be done
at once, and everything else happens in the hub's thread. A frame that finds the queue full is
counted and not watched: the line is never delayed.
"""

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from lpvit_edge.dashboard.counters import FrameCounters
from lpvit_edge.dashboard.frame_energy import frame_energy
from lpvit_edge.dashboard.identity import CheckedEnergy
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.dashboard.snapshot import (
    DriftNow,
    EventNow,
    FramesNow,
    ShadowNow,
    Snapshot,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lpvit_edge.line.records import FrameRecord, Severity

_QUEUED = 64
_MOST_BYTES = 64 << 20  # of pictures that wait to be looked at
_EVENTS = 50
_NO_LINE = "no line is running here"
_UNCHECKED = CheckedEnergy(reason=_NO_LINE)
_QUIET_S = 10.0  # without a frame, before the power counts as idle
_SETTLING_S = 2.0  # at the beginning of such a time
_IDLE_S = 30.0  # that the idle power is a mean of, at most
_LAST_S = 5.0  # for a watcher that does not come back when the line ends


class Watcher(Protocol):
    """Who looks at frames in the hub's thread; see lpvit_edge.drift.monitor.DriftMonitor."""

    def see(
        self,
        record: "FrameRecord",
        embedding: "NDArray[np.float32] | None",
        image: "NDArray[np.uint8] | None",
    ) -> None: ...

    def drift_now(self, *, not_watched: int) -> tuple[DriftNow | None, str | None]: ...

    def shadow_now(self) -> tuple[ShadowNow | None, str | None]: ...

    def close(self) -> None: ...


class Feed(Protocol):
    """Anything that knows the present: this device's hub, or another device's page."""

    def now(self) -> Snapshot: ...


class Hub:
    """Implements lpvit_edge.line.records.TelemetryHub; a context manager that owns its threads."""

    def __init__(
        self,
        *,
        device: Mapping[str, str],
        power: PowerMonitor,
        engine: Mapping[str, str] | None = None,
        checked: CheckedEnergy = _UNCHECKED,
        watcher: Watcher | None = None,
        root: Path = Path("/"),
    ) -> None:
        self._device = dict(device)
        self._engine = None if engine is None else dict(engine)
        self._checked = checked
        self.power = power
        self.watcher = watcher
        self.shadow: Callable[[], ShadowNow] | None = None
        self.dropped: Callable[[], int] | None = None  # where a line runs
        self.failed: Callable[[str], None] = (
            self._say_failed
        )  # told that the watch ended with an unexpected error
        self._failure: str | None = None
        self._root = root
        self._lock = threading.Lock()
        self._counters = FrameCounters()
        self._events: deque[EventNow] = deque(maxlen=_EVENTS)
        self._event_counts: Counter[str] = Counter()
        self._idle_w: float | None = None
        self._quiet_since_s: float | None = None
        self._not_watched = 0
        self._waiting_bytes = 0
        self._queue: queue.Queue[
            tuple[FrameRecord, NDArray[np.float32] | None, NDArray[np.uint8] | None] | None
        ] = queue.Queue(_QUEUED)
        self._began_s = time.monotonic()
        self._cpu: tuple[float, float, float | None] = (time.process_time(), self._began_s, None)
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)

    def __enter__(self) -> "Hub":
        self.power.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=_LAST_S)
        self._thread.join(_LAST_S)
        if self.watcher is not None:
            self.watcher.close()
        self.power.__exit__(kind, error, traceback)

    def publish_frame(
        self,
        record: "FrameRecord",
        embedding: "NDArray[np.float32] | None",
        image: "NDArray[np.uint8] | None",
    ) -> None:
        """One decided frame; see TelemetryHub. Returns at once."""
        now_s = time.monotonic()
        with self._lock:
            self._note_idle(now_s)
            self._counters.add(record, at_s=now_s)
        if self.watcher is None:
            return
        size = 0 if image is None else image.nbytes
        with self._lock:
            waiting = self._waiting_bytes
            if self._queue.full() or (waiting and waiting + size > _MOST_BYTES):
                self._not_watched += 1
                return
            self._waiting_bytes += size
            self._queue.put_nowait((record, embedding, image))  # whoever puts holds the lock

    def publish_event(self, kind: str, text: str, severity: "Severity", at: float) -> None:
        """Something that happened to the line; see LineEvent."""
        with self._lock:
            self._events.append(
                EventNow(at=at, kind=kind[:500], text=text[:500], severity=severity)
            )
            self._event_counts[severity] += 1

    def waits(self) -> None:
        """The line is ready for its first frame: what is drawn from now on is idle power."""
        self._quiet_since_s = time.monotonic()

    def _note_idle(self, now_s: float) -> None:
        """What was drawn before this frame, where none came for long enough."""
        since_s, self._quiet_since_s = self._quiet_since_s, now_s
        if since_s is not None and now_s - since_s >= _QUIET_S:
            quiet_s = min(now_s - since_s - _SETTLING_S, _IDLE_S)
            self._idle_w = self.power.mean_w(seconds=quiet_s)

    def show_engine(self, engine: Mapping[str, str] | None, checked: CheckedEnergy) -> None:
        """Another bundle took over: what the page says of the engine."""
        self._engine = None if engine is None else dict(engine)
        self._checked = checked

    def watch(self, watcher: Watcher | None) -> None:
        """From now on, another one looks at the frames; None where nobody can."""
        self.watcher = watcher
        self._failure = None

    def now(self) -> Snapshot:
        """Everything that is known at this moment."""
        from lpvit_profilers.machine import temperatures_c

        now_s = time.monotonic()
        power, conditions = self.power.now(), self.power.conditions()
        with self._lock:
            counters = self._counters.copy()
            events, counts = tuple(self._events), dict(self._event_counts)
            not_watched = self._not_watched
        frames, latency = self._frames(counters, now_s), counters.latency()
        drift, drift_reason = self._drift(not_watched)
        shadow, shadow_reason = self._shadow()
        temperatures = temperatures_c(self._root)
        if not temperatures and conditions.temperature_c is not None:
            temperatures = {"sensor": conditions.temperature_c}
        return Snapshot(
            at=time.time(),
            uptime_s=now_s - self._began_s,
            device=self._device,
            engine=self._engine,
            power=power,
            energy=frame_energy(
                power_w=None if power.stale else self.power.mean_w(seconds=10.0),
                scope=power.scope,
                per_s=0.0 if frames is None else frames.per_s,
                idle_w=self._idle_w,
                checked=self._checked,
            ),
            latency=latency,
            frames=frames,
            drift=drift,
            drift_reason=drift_reason,
            shadow=shadow,
            shadow_reason=shadow_reason,
            temperatures_c=dict(list(temperatures.items())[:32]),
            throttling=conditions.throttling,
            throttle_events=conditions.throttle_events,
            clock_mhz=conditions.clock_mhz,
            events=events,
            event_counts=counts,
            own_cpu_share=self._cpu_share(now_s),
        )

    def _frames(self, counters: FrameCounters, now_s: float) -> FramesNow | None:
        """What was counted; None where no line runs."""
        if self.dropped is not None:
            return counters.frames(now_s=now_s, dropped=self.dropped())
        return counters.frames(now_s=now_s, dropped=0) if counters.total else None

    def _drift(self, not_watched: int) -> tuple[DriftNow | None, str | None]:
        if self.watcher is None:
            without = "this line runs without a drift watch" if self._engine else _NO_LINE
            return None, self._failure or without
        return self.watcher.drift_now(not_watched=not_watched)

    def _shadow(self) -> tuple[ShadowNow | None, str | None]:
        if self.shadow is not None:
            now = self.shadow()
            return now, now.reason
        if self.watcher is None:
            return None, "no dense engine runs beside this line" if self._engine else _NO_LINE
        return self.watcher.shadow_now()

    def _cpu_share(self, now_s: float) -> float | None:
        """Of one core, since the last time somebody asked a second or more ago."""
        used_s, asked_s, share = self._cpu
        if now_s - asked_s >= 1.0:
            share = (time.process_time() - used_s) / (now_s - asked_s)
            self._cpu = (time.process_time(), now_s, share)
        return share

    def _work(self) -> None:
        before: Watcher | None = None
        while (item := self._queue.get()) is not None:
            watcher = self.watcher  # another one where another bundle took over
            left, before = before, watcher
            with self._lock:
                self._waiting_bytes -= 0 if item[2] is None else item[2].nbytes
            try:
                if left is not None and left is not watcher:
                    left.close()
                if watcher is not None:
                    watcher.see(*item)
            except Exception as error:  # its state is unknown now: no level is better than an old
                before = None
                if self.watcher is watcher:
                    self._failure = f"the drift watch ended: {type(error).__name__}: {error}"[:500]
                    self.watcher = None
                    self.failed(self._failure)

    def _say_failed(self, text: str) -> None:
        self.publish_event("drift", text, "alarm", time.time())
