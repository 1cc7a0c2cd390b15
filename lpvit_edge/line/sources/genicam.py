"""GigE Vision and USB3 Vision cameras through a GenTL producer (.cti), with harvesters."""

import contextlib
import time
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


class GenicamCamera:
    """Frames as the producer hands them over, with the camera's own frame number."""

    def __init__(self, harvester: Any, acquirer: Any, features: dict[str, Any]) -> None:
        self._harvester = harvester
        self._acquirer = acquirer
        for name, value in features.items():
            _set_feature(acquirer.remote_device.node_map, name, value)
        acquirer.num_buffers = max(_BUFFERS, acquirer.num_buffers)
        acquirer.start()

    def read(self, timeout_s: float) -> Captured | None:
        """The next frame; None while no trigger comes.

        A frame that the producer reports as incomplete is not handed over; its number is missing
        in the sequence, so that it counts as a trigger that was never seen.
        """
        try:
            buffer = self._acquirer.try_fetch(timeout=timeout_s)
            if buffer is None:
                return None
            with buffer:
                return _captured(buffer)
        except _errors() as error:
            raise SourceError(f"the camera was lost: {error}") from error

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


def _captured(buffer: Any) -> Captured:
    parts = buffer.payload.components
    if parts:
        first = parts[0]
        pixels, fault = to_rgb(first.data, first.height, first.width, first.data_format)
    else:
        pixels, fault = None, "corrupt frame: the buffer holds no picture"
    return Captured(
        pixels=pixels,
        captured_at=time.time(),
        captured_ns=time.monotonic_ns(),
        counter=_frame_number(buffer.module),
        fault=fault,
    )


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
