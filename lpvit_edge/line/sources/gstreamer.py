"""A GStreamer pipeline, as on Jetson for CSI cameras: nvarguscamerasrc ... ! appsink.

Needs the system's python3-gi. Not in any wheel, so that the venv must see the system's packages.
"""

import time
from typing import Any

import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.errors import MissingDependencyError, SourceError
from lpvit_edge.line.config import GstreamerSource
from lpvit_edge.line.frames import Captured
from lpvit_edge.line.redact import redacted

_OLDEST_NS = 10_000_000_000
_TAIL = "! videoconvert ! video/x-raw,format=RGB ! appsink name=lpvit max-buffers=2 drop=false"


class Pipeline:
    """Frames of an appsink, RGB, stamped when they arrive."""

    def __init__(self, gst: Any, pipeline: Any) -> None:
        self._gst = gst
        self._pipeline = pipeline
        self._sink = pipeline.get_by_name("lpvit")
        if pipeline.set_state(gst.State.PLAYING) == gst.StateChangeReturn.FAILURE:
            try:
                self._raise_reported()
                raise SourceError("the GStreamer pipeline does not start and does not say why")
            finally:
                self.close()

    def read(self, timeout_s: float) -> Captured | None:
        """The next frame. Raises SourceError with what the pipeline reports."""
        sample = self._sink.emit("try-pull-sample", int(timeout_s * self._gst.SECOND))
        if sample is None:
            self._raise_reported()
            return None
        age_ns = self._age_ns(sample)
        return Captured(
            pixels=self._pixels(sample),
            captured_at=time.time() - age_ns / 1e9,
            captured_ns=time.monotonic_ns() - age_ns,
            counter=None,
        )

    def _age_ns(self, sample: Any) -> int:
        """How long the frame was under way, by its time stamp; 0 where it has no sensible one."""
        pts, clock = sample.get_buffer().pts, self._pipeline.get_clock()
        if clock is None or pts == self._gst.CLOCK_TIME_NONE:
            return 0
        age_ns = int(clock.get_time() - self._pipeline.get_base_time() - pts)
        return age_ns if 0 <= age_ns < _OLDEST_NS else 0

    def _pixels(self, sample: Any) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        shape = sample.get_caps().get_structure(0)
        width, height = shape.get_value("width"), shape.get_value("height")
        buffer = sample.get_buffer()
        content = np.frombuffer(buffer.extract_dup(0, buffer.get_size()), np.uint8)
        stride = content.size // height  # rows are padded to four bytes
        rows = content[: stride * height].reshape(height, stride)
        return np.ascontiguousarray(rows[:, : width * 3].reshape(height, width, 3))

    def _raise_reported(self) -> None:
        kinds = self._gst.MessageType.ERROR | self._gst.MessageType.EOS
        message = self._pipeline.get_bus().pop_filtered(kinds)
        if message is None:
            return
        if message.type == self._gst.MessageType.ERROR:
            error, _ = message.parse_error()
            raise SourceError(f"the GStreamer pipeline stopped: {redacted(error.message)}")
        raise SourceError("the GStreamer pipeline ended; is the camera still plugged in?")

    def close(self) -> None:
        """Stop the pipeline."""
        self._pipeline.set_state(self._gst.State.NULL)


def open_pipeline(config: GstreamerSource) -> Pipeline:
    """Parse and start the pipeline, to which conversion to RGB and the appsink are added."""
    gi = require("gi")
    try:
        gi.require_version("Gst", "1.0")
    except ValueError as error:
        raise MissingDependencyError(f"{error}: apt install gir1.2-gstreamer-1.0") from error
    gst, glib = require("gi.repository.Gst"), require("gi.repository.GLib")
    gst.init(None)
    try:
        pipeline = gst.parse_launch(f"{config.target} {_TAIL}")
    except glib.Error as error:
        raise SourceError(f"GStreamer refused the pipeline: {redacted(error.message)}") from error
    return Pipeline(gst, pipeline)
