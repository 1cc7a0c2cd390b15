"""GigE Vision and USB3 Vision cameras through a GenTL producer (.cti), with harvesters."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.errors import SourceError
from lpvit_edge.line.config import GenicamSource
from lpvit_edge.line.frames import Captured

_GREY = {"Mono8"}
_COLOUR = {"RGB8", "RGB8Packed", "BGR8", "BGR8Packed"}


class GenicamCamera:
    """Frames as the producer hands them over, with the camera's own frame number."""

    def __init__(self, harvester: Any, acquirer: Any) -> None:
        self._harvester = harvester
        self._acquirer = acquirer
        acquirer.start()

    def read(self, timeout_s: float) -> Captured | None:
        """The next frame; None while no trigger comes."""
        genapi = require("harvesters.core")
        try:
            buffer = self._acquirer.try_fetch(timeout=timeout_s)
        except genapi.TimeoutException:
            return None
        except RuntimeError as error:
            raise SourceError(f"the camera was lost: {error}") from error
        if buffer is None:
            return None
        with buffer:
            part = buffer.payload.components[0]
            pixels, fault = to_rgb(part.data, part.height, part.width, part.data_format)
            return Captured(
                pixels=pixels,
                captured_at=time.time(),
                captured_ns=time.monotonic_ns(),
                counter=int(buffer.frame_id) if hasattr(buffer, "frame_id") else None,
                fault=fault,
            )

    def close(self) -> None:
        """Stop and free the camera, and unload the producer."""
        self._acquirer.destroy()
        self._harvester.reset()


def to_rgb(
    data: "np.ndarray[Any, np.dtype[np.uint8]]", height: int, width: int, pixel_format: str
) -> "tuple[np.ndarray[Any, np.dtype[np.uint8]] | None, str | None]":
    """A component as (height, width, 3) RGB and None, or None and what is wrong with it."""
    channels = 1 if pixel_format in _GREY else 3
    if pixel_format not in _GREY | _COLOUR:
        return None, f"pixel format {pixel_format}: set the camera to Mono8, RGB8 or BGR8"
    if data.size != height * width * channels:
        return None, f"corrupt frame: {data.size} bytes for {width} x {height} {pixel_format}"
    image = np.array(data, np.uint8).reshape(height, width, channels)
    if channels == 1:
        return np.repeat(image, 3, axis=2), None
    return (image[:, :, ::-1].copy() if pixel_format.startswith("BGR") else image), None


def open_camera(config: GenicamSource) -> GenicamCamera:
    """Load the producer and open the camera of that serial number."""
    core = require("harvesters.core")
    if not Path(config.cti).is_file():
        raise SourceError(
            f"{config.cti}: no such GenTL producer; the camera's vendor ships one for this machine"
        )
    harvester = core.Harvester()
    harvester.add_file(config.cti)
    harvester.update()
    serials = [info.serial_number for info in harvester.device_info_list]
    if config.target not in serials:
        harvester.reset()
        raise SourceError(
            f"no camera with serial number {config.target!r}; the producer sees {serials}"
        )
    try:
        return GenicamCamera(harvester, harvester.create({"serial_number": config.target}))
    except RuntimeError as error:
        harvester.reset()
        raise SourceError(f"camera {config.target} cannot be opened: {error}") from error
