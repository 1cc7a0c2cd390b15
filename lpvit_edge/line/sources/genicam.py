"""GigE Vision and USB3 Vision cameras through a GenTL producer (.cti), with harvesters."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.errors import SourceError
from lpvit_edge.line.config import GenicamSource
from lpvit_edge.line.frames import Captured

_CHANNELS = {
    "Mono8": 1,
    **dict.fromkeys(("RGB8", "RGB8Packed", "BGR8", "BGR8Packed"), 3),
    **dict.fromkeys(("RGBa8", "BGRa8"), 4),
}
_BUFFERS = 8  # in the producer, for the moments in which this process is not scheduled
_WAITED_NS = 3_000_000  # a fetch that took as long waited for its buffer


class GenicamCamera:
    """Frames as the producer hands them over, with the camera's own frame number."""

    def __init__(self, harvester: Any, acquirer: Any, features: dict[str, Any]) -> None:
        self._harvester = harvester
        self._acquirer = acquirer
        for name, value in features.items():
            _set_feature(acquirer.remote_device.node_map, name, value)
        acquirer.num_buffers = max(_BUFFERS, acquirer.num_buffers)
        self._ages = BufferAges()
        self._counter: int | None = None
        self._incomplete = False
        _tell_incomplete(acquirer, self._note_incomplete)
        acquirer.start()

    def read(self, timeout_s: float) -> Captured | None:
        """The next frame; None while no trigger comes. One that lacks packets has no pixels."""
        begin_ns = time.monotonic_ns()
        try:
            buffer = self._acquirer.try_fetch(timeout=timeout_s)
            now_ns = time.monotonic_ns()
            if buffer is None:
                return self._damaged(now_ns) if self._incomplete else None
            self._incomplete = False
            with buffer:
                self._counter = _frame_number(buffer.module)
                age_ns = self._ages.age_ns(
                    _timestamp_ns(buffer.module), now_ns, waited=now_ns - begin_ns > _WAITED_NS
                )
                pixels, fault = _picture(buffer)
                return _captured(pixels, fault, self._counter, now_ns - age_ns)
        except _errors() as error:
            raise SourceError(f"the camera was lost: {error}") from error

    def _note_incomplete(self) -> None:
        self._incomplete = True

    def _damaged(self, now_ns: int) -> Captured:
        """harvesters keeps the buffer for itself; it is taken to be the next one."""
        self._incomplete = False
        if self._counter is not None:
            self._counter += 1
        fault = "corrupt frame: the buffer is incomplete; were packets lost?"
        return _captured(None, fault, self._counter, now_ns)

    def close(self) -> None:
        """Stop and free the camera, and unload the producer."""
        with contextlib.suppress(*_errors()):  # it may be unplugged
            self._acquirer.destroy()
        with contextlib.suppress(*_errors()):
            self._harvester.reset()


def _errors() -> tuple[type[Exception], ...]:
    """What harvesters raises; the two libraries below it share no base class."""
    gentl, genapi = require("genicam.gentl"), require("genicam.genapi")
    return gentl.GenericException, genapi.GenericException, RuntimeError


class BufferAges:
    """How old buffers are when they are fetched, by the camera's time stamps.

    A fetch that had to wait got its buffer fresh, which says how the camera's clock stands to this
    machine's. By that a buffer that was there already is as old as its time stamp says.
    """

    def __init__(self) -> None:
        self._ahead_ns: int | None = None  # this machine's clock before the camera's
        self._stamp_ns: int | None = None

    def age_ns(self, stamp_ns: int | None, now_ns: int, *, waited: bool) -> int:
        """Nanoseconds; 0 where the camera gives no time stamp, or one that stands still."""
        stands_still = stamp_ns == self._stamp_ns
        self._stamp_ns = stamp_ns
        if stamp_ns is None or stands_still:
            return 0
        ahead_ns = now_ns - stamp_ns
        if waited or self._ahead_ns is None or ahead_ns < self._ahead_ns:
            self._ahead_ns = ahead_ns
        return ahead_ns - self._ahead_ns


def _timestamp_ns(module: Any) -> int | None:
    """When the camera took the buffer, by its own clock; None without a unit that is known."""
    gone = require("genicam.gentl").GenericException
    try:
        return int(module.timestamp_ns)
    except gone:
        pass
    try:  # ticks, whose frequency the device may give (DEVICE_INFO_TIMESTAMP_FREQUENCY)
        frequency_hz = int(module.parent.parent.timestamp_frequency)
        return int(module.timestamp) * 1_000_000_000 // frequency_hz if frequency_hz > 0 else None
    except gone:
        return None


def _picture(buffer: Any) -> "tuple[np.ndarray[Any, np.dtype[np.uint8]] | None, str | None]":
    parts = buffer.payload.components
    if not parts:
        return None, "corrupt frame: the buffer holds no picture"
    first = parts[0]
    return to_rgb(first.data, first.height, first.width, first.data_format)


def _captured(pixels: Any, fault: str | None, counter: int | None, captured_ns: int) -> Captured:
    age_s = (time.monotonic_ns() - captured_ns) / 1e9
    return Captured(
        pixels=pixels,
        captured_at=time.time() - age_s,
        captured_ns=captured_ns,
        counter=counter,
        fault=fault,
    )


def _tell_incomplete(acquirer: Any, note: Callable[[], None]) -> None:
    """Call note() when the producer hands over a buffer that lacks packets."""
    base = require("harvesters.core").Callback
    told = type("Incomplete", (base,), {"emit": lambda self, context: note()})
    acquirer.add_callback(acquirer.Events.INCOMPLETE_BUFFER, told())


def _frame_number(module: Any) -> int | None:
    try:
        return int(module.frame_id)
    except require("genicam.gentl").GenericException:
        return None  # a producer need not count


def _set_feature(node_map: Any, name: str, value: Any) -> None:
    try:
        getattr(node_map, name).value = value
    except (AttributeError, TypeError) as error:
        raise SourceError(f"the camera has no feature {name} that can be {value!r}") from error
    except _errors() as error:
        raise SourceError(f"the camera refused {name} = {value!r}: {error}") from error


def to_rgb(
    data: "np.ndarray[Any, np.dtype[np.uint8]]", height: int, width: int, pixel_format: str
) -> "tuple[np.ndarray[Any, np.dtype[np.uint8]] | None, str | None]":
    """A component as (height, width, 3) RGB and None, or None and what is wrong with it."""
    channels = _CHANNELS.get(pixel_format)
    if channels is None:
        return None, f"pixel format {pixel_format}: set the camera to Mono8, RGB8 or BGR8"
    if data.size != height * width * channels:
        return None, f"corrupt frame: {data.size} bytes for {width} x {height} {pixel_format}"
    image = np.array(data, np.uint8).reshape(height, width, channels)
    if channels == 1:
        return np.repeat(image, 3, axis=2), None
    order = [2, 1, 0] if pixel_format.startswith("BGR") else [0, 1, 2]
    return np.ascontiguousarray(image[:, :, order]), None


def open_camera(config: GenicamSource) -> GenicamCamera:
    """Load the producer and open the camera of that serial number."""
    core = require("harvesters.core")
    if not Path(config.cti).is_file():
        raise SourceError(
            f"{config.cti}: no such GenTL producer; the camera's vendor ships one for this machine"
        )
    harvester = core.Harvester()
    try:
        harvester.add_file(config.cti)
        harvester.update()
        serials = [info.serial_number for info in harvester.device_info_list]
        if config.target not in serials:
            raise SourceError(
                f"no camera with serial number {config.target!r}; the producer sees "
                f"{serials or 'none (nor does one that cannot be loaded)'}"
            )
        acquirer = harvester.create({"serial_number": config.target})
        return GenicamCamera(harvester, acquirer, config.features)
    except _errors() as error:
        harvester.reset()
        raise SourceError(f"camera {config.target} cannot be opened: {error}") from error
    except SourceError:
        harvester.reset()
        raise
