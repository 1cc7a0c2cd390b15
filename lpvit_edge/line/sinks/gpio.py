"""A reject line: a pulse on a GPIO line when a rejected part has come to the ejector.

The pulse begins `delay_ms` after the part's trigger, by the clock that the trigger was stamped
with, not after its verdict. A part whose trigger nobody saw, and one whose pulse could only begin
more than `tolerance_ms` late, gets none, is counted as missed and told: it would hit another part.
"""

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Any, Literal

from lpvit_edge.deps import require
from lpvit_edge.errors import SinkError
from lpvit_edge.line.clock import Clock, SystemClock
from lpvit_edge.line.guarded import GuardedThread
from lpvit_edge.line.records import FrameRecord
from lpvit_edge.line.sink_config import GpioSink
from lpvit_edge.line.sinks.pulses import PulseTrain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_AGAIN_S = 1.0  # between two attempts to have a line that was lost
_IDLE_S = 60.0
_REMEDIES = {
    errno.EBUSY: "; another program, or another sink of this line, holds it: gpioinfo says which",
    errno.EACCES: "; the user of this process may not open it: add it to the group of the device",
    errno.ENOENT: "; gpiodetect lists the chips",
    errno.EINVAL: "; gpioinfo lists the lines of the chip",
}


class GpioReject:
    """Holds the line from its construction to close(), at the safe level unless a pulse runs."""

    def __init__(self, config: GpioSink, clock: Clock | None = None) -> None:
        """Request the line. Raises MissingDependencyError, SinkError."""
        self.name = f"gpio {config.target} line {config.line}"
        self._config = config
        self._line = int(config.line) if str(config.line).isdecimal() else config.line
        self._clock = clock or SystemClock()
        self._gpiod = require("gpiod")
        self._levels = require("gpiod.line").Value
        self._train = PulseTrain(
            pulse_ns=round(config.pulse_ms * 1e6), tolerance_ns=round(config.tolerance_ms * 1e6)
        )
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop: Literal["no", "when done", "now"] = "no"
        self._is_held = True  # until the line says that it judges
        self._unserved = 0  # rejects without a pulse, but for those that the train gave up
        self.error: str | None = None
        self._level = config.safe == "active"
        self._request: Any = self._requested(self._level)
        self.thread = GuardedThread(self._run, name=self.name, failed=self._ended)
        self.thread.start()

    @property
    def missed(self) -> int:
        """Rejects that got no pulse."""
        return self._unserved + self._train.missed

    def deliver(self, record: FrameRecord, pixels: "NDArray[np.uint8] | None") -> None:
        """Plan the pulse of a rejected part."""
        if record.action != "reject":
            return
        with self._lock:
            if record.untimed or self._request is None:
                self._unserved += 1
                return
            self._train.add(record.captured_ns + round(self._config.delay_ms * 1e6))
        self._wake.set()

    def hold(self, is_held: bool) -> None:
        """Take the safe level, or leave it. Pulses of parts that were judged still come."""
        self._is_held = is_held
        self._wake.set()

    def close(self, timeout_s: float) -> int:
        """Give the pulses that come due in time, take the safe level and let the line go."""
        self._stop = "when done"
        self._wake.set()
        self.thread.join(timeout_s)
        self._stop = "now"
        self._wake.set()
        self.thread.join(2.0)
        return self._train.waiting

    def _run(self) -> None:
        while True:
            with self._lock:
                is_pulse = self._train.is_active(self._clock.monotonic_ns())
                next_ns = self._train.next_ns()
            self._show(is_pulse or (self._is_held and self._config.safe == "active"))
            if self._stop == "now" or (self._stop == "when done" and next_ns is None):
                break
            wait_s = _IDLE_S if self._request is not None else _AGAIN_S
            if next_ns is not None:
                wait_s = min(wait_s, max(0.0, (next_ns - self._clock.monotonic_ns()) / 1e9))
            self._clock.wait(self._wake, wait_s)
            self._wake.clear()
        self._show(self._config.safe == "active")
        self._let_go()

    def _ended(self, text: str) -> None:
        self.error = f"{self.name}: {text}; no part is rejected any more"

    def _show(self, is_active: bool) -> None:
        """Have the line at that level; where it was lost, have it anew."""
        if self._request is not None and is_active == self._level:
            return
        try:
            if self._request is None:
                self._request = self._requested(is_active)
            else:
                self._request.set_value(self._line, self._value(is_active))
        except (OSError, SinkError) as error:
            self.error = str(error) if isinstance(error, SinkError) else self._text(error)
            self._let_go()
            with self._lock:
                self._unserved += self._train.clear()
            return
        self._level, self.error = is_active, None

    def _requested(self, is_active: bool) -> Any:
        """The line as an output that stands at that level from the first moment."""
        config = self._config
        words = require("gpiod.line")
        settings = self._gpiod.LineSettings(
            direction=words.Direction.OUTPUT,
            output_value=self._value(is_active),
            active_low=config.active_low,
            drive=getattr(words.Drive, config.drive.upper().replace(" ", "_")),
        )
        try:
            return self._gpiod.request_lines(
                config.target, consumer="lpvit-edge", config={self._line: settings}
            )
        except OSError as error:
            raise SinkError(self._text(error)) from error
        except ValueError as error:  # gpiod's word for a name that no line of the chip has
            raise SinkError(f"{self.name}: {error}{_REMEDIES[errno.EINVAL]}") from error

    def _value(self, is_active: bool) -> Any:
        return self._levels.ACTIVE if is_active else self._levels.INACTIVE

    def _text(self, error: OSError) -> str:
        number = error.errno or 0
        return f"{self.name}: {os.strerror(number)}{_REMEDIES.get(number, '')}"

    def _let_go(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            with contextlib.suppress(OSError):
                request.release()
