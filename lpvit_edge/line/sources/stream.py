"""Video files, RTSP streams and V4L2 cameras, through PyAV (FFmpeg)."""

import time
from typing import Any

from lpvit_edge.deps import require
from lpvit_edge.errors import SourceError
from lpvit_edge.line.config import RtspSource, V4l2Source, VideoSource
from lpvit_edge.line.frames import Captured
from lpvit_edge.line.redact import redacted
from lpvit_edge.line.sources.base import EndOfSource

_MOST_CORRUPT = 100  # one after another; beyond them nothing will be decoded any more


class Stream:
    """Frames of the first video stream of an FFmpeg input, RGB, stamped when they are decoded."""

    def __init__(
        self,
        container: Any,
        *,
        name: str,
        ends: bool,
        period_s: float | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._container = container
        self._timeout_s = timeout_s
        self._name = name
        self._ends = ends
        self._period_s = period_s
        self._due_s = time.monotonic()
        self._corrupt = 0
        if not container.streams.video:
            container.close()
            raise SourceError(f"{name}: holds no video")
        self._frames = container.decode(video=0)

    def read(self, timeout_s: float) -> Captured | None:
        """The next frame. A frame that cannot be decoded comes without pixels."""
        if self._period_s is not None:
            wait_s = self._due_s - time.monotonic()
            if wait_s > timeout_s:
                time.sleep(timeout_s)
                return None
            time.sleep(max(0.0, wait_s))
            self._due_s = max(self._due_s + self._period_s, time.monotonic() - self._period_s)
        av = require("av")
        begin_s = time.monotonic()
        try:
            frame = next(self._frames)
        except (StopIteration, av.error.FFmpegError) as error:
            # FFmpeg calls an interrupted read an end, or rubbish, as the protocol has it.
            if is_late(begin_s, self._timeout_s):
                raise SourceError(f"{self._name}: {_WORDS['TimeoutError']}") from error
            if isinstance(error, (StopIteration, EOFError)):
                raise self._end() from error
            if isinstance(error, av.error.InvalidDataError):
                return self._damaged(str(error.strerror))
            raise SourceError(f"{self._name}: {in_words(error)}") from error
        if frame.is_corrupt:
            return self._captured(None, "corrupt frame: the decoder reports damage")
        self._corrupt = 0
        return self._captured(frame.to_ndarray(format="rgb24"), None)

    def _damaged(self, reason: str) -> Captured:
        """A frame that cannot be decoded; the next one may be, but not for ever."""
        self._corrupt += 1
        if self._corrupt > _MOST_CORRUPT:
            raise SourceError(
                f"{self._name}: {_MOST_CORRUPT} frames one after another cannot be decoded "
                f"({reason}); is the codec right, is the cable?"
            )
        self._frames = self._container.decode(video=0)
        return self._captured(None, f"corrupt frame: {reason}")

    def _captured(self, pixels: Any, fault: str | None) -> Captured:
        return Captured(
            pixels=pixels, captured_at=time.time(), captured_ns=time.monotonic_ns(), fault=fault
        )

    def _end(self) -> Exception:
        if self._ends:
            return EndOfSource(self._name)
        return SourceError(f"{self._name}: the stream ended; is the camera still plugged in?")

    def close(self) -> None:
        """Close the input."""
        self._container.close()


def open_video(config: VideoSource) -> Stream:
    """A video file, as fast as it is read or at `rate` frames per second."""
    period_s = None if config.rate is None else 1.0 / config.rate
    container = _open(config.target, name=config.target)
    return Stream(container, name=config.target, ends=not config.live, period_s=period_s)


def open_rtsp(config: RtspSource) -> Stream:
    """An RTSP stream, over TCP so that no packet is lost."""
    name = redacted(config.target)
    options = {
        "rtsp_transport": config.transport,
        "fflags": "nobuffer",
        "analyzeduration": "1000000",  # us; a camera that comes back is not looked at for longer
    }
    container = _open(config.target, name=name, options=options, timeout_s=config.timeout_s)
    return Stream(container, name=name, ends=False, timeout_s=config.timeout_s)


def open_v4l2(config: V4l2Source) -> Stream:
    """A camera of the kernel, /dev/video0."""
    options = {}
    if config.rate is not None:
        options["framerate"] = f"{config.rate:g}"
    if config.size is not None:
        options["video_size"] = config.size
    container = _open(
        config.target, name=config.target, options=options, format="v4l2", timeout_s=4.0
    )
    return Stream(container, name=config.target, ends=False)


def _open(
    target: str,
    *,
    name: str,
    options: dict[str, str] | None = None,
    format: str | None = None,
    timeout_s: float | None = None,
) -> Any:
    av = require("av")
    begin_s = time.monotonic()
    try:
        return av.open(target, options=options or {}, format=format, timeout=timeout_s)
    except av.error.FFmpegError as error:
        if is_late(begin_s, timeout_s):
            raise SourceError(f"{name}: {_WORDS['TimeoutError']}") from error
        raise SourceError(f"{name}: {in_words(error)}") from error
    except ValueError as error:  # an input format that this FFmpeg was built without
        raise SourceError(f"{name}: {error}") from error


def is_late(begin_s: float, timeout_s: float | None) -> bool:
    """Whether what began then ended because its time was over."""
    return timeout_s is not None and time.monotonic() - begin_s >= timeout_s


_WORDS = {
    "FileNotFoundError": "not found: no such file or device; is it plugged in, is the path right?",
    "PermissionError": "not permitted: add the user to the group `video`, or change the rights",
    "IsADirectoryError": "is a folder; to judge the images in it: folder:PATH",
    "HTTPUnauthorizedError": "refused: user or password is wrong",
    "HTTPForbiddenError": "refused: the user may not see this stream",
    "HTTPNotFoundError": "not found: the camera has no stream of that path",
    "ConnectionRefusedError": "refused: nothing listens there; check host and port",
    "ConnectionResetError": "lost: the other side closed the connection",
    "TimeoutError": "timed out: check the cable, the address and the firewall",
    "ExitError": "timed out: check the cable, the address and the firewall",
    "InvalidDataError": "not a video that can be decoded",
    "ProtocolNotFoundError": "this FFmpeg does not know the protocol",
    "OSError": "input or output error: the device may be unplugged or in use",
}


def in_words(error: Any) -> str:
    """What an FFmpeg error means to the person at the line; never the address with its password."""
    for kind in type(error).__mro__:
        if kind.__name__ in _WORDS:
            return _WORDS[kind.__name__]
    return f"{type(error).__name__}: {error.strerror}"
