"""Everybody who is told: sinks and the hub, in the line's own thread, none able to stop it."""

import threading
from typing import TYPE_CHECKING

from lpvit_edge.errors import SinkError
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.records import FrameRecord, LineEvent, TelemetryHub
from lpvit_edge.line.shadow import Shadow
from lpvit_edge.line.sinks import Sink

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Outputs:
    """The sinks, told of every verdict, and the hub, told of events too."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.sinks: tuple[Sink, ...] = ()
        self.hub: TelemetryHub | None = None
        self.shadow: Shadow | None = None
        self.held: str | None = None
        self._holding = threading.Lock()  # all sinks are held, or none
        self.errors: dict[str, str] = {}

    def tell(
        self,
        record: FrameRecord,
        pixels: "NDArray[np.uint8] | None",
        embedding: "NDArray[np.float32] | None",
    ) -> None:
        """Tell a verdict."""
        for sink in self.sinks:
            try:
                sink.deliver(record, pixels)
                self.errors.pop(sink.name, None)
            except SinkError as error:
                self.errors[sink.name] = str(error)
        if self.hub is not None:
            self.hub.publish_frame(record, embedding, pixels)
        if self.shadow is not None:
            self.shadow.offer(record, pixels)

    def tell_event(self, event: LineEvent) -> None:
        """Tell what happened to the line; remote sinks read it in the journal."""
        if self.hub is not None:
            self.hub.publish_event(event.kind, event.text, event.severity, event.at)

    def faults(self) -> dict[str, str]:
        """By sink, what is wrong with it now."""
        found = {sink.name: sink.error or self.errors.get(sink.name) for sink in self.sinks}
        return {name: text for name, text in found.items() if text}

    def missed(self) -> dict[str, int]:
        """By sink, verdicts that it missed; under `journal`, entries that no disk took."""
        found = {sink.name: sink.missed for sink in self.sinks} | {"journal": self._journal.lost}
        return {name: count for name, count in found.items() if count}

    def hold(self, reason: str | None) -> None:
        """Take the safe position for that reason, or leave it (None); any thread may call."""
        with self._holding:
            was_held, self.held = self.held is not None, reason
            if was_held == (reason is not None):
                return
            for sink in self.sinks:
                try:
                    sink.hold(reason is not None)
                except SinkError as error:
                    self.errors[sink.name] = str(error)

    def close(self, timeout_s: float) -> dict[str, int]:
        """Close every sink; what each could not deliver, which stays in the journal."""
        left = {sink.name: sink.close(timeout_s) for sink in self.sinks}
        return {name: count for name, count in left.items() if count}
