"""A camera that is a Python function: for trying a line, and for testing one."""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lpvit_edge.errors import SourceError
from lpvit_edge.line.config import SyntheticSource
from lpvit_edge.line.frames import Captured


class SyntheticCamera:
    """Triggers at a fixed rate, whether anybody looks or not, like a camera on a light barrier.

    Its counter is the number of the trigger since the machine's start, so that triggers which
    nobody took are known. The function makes one image (height, width, 3) uint8 from that number.
    """

    def __init__(self, image: Callable[[int], Any], config: SyntheticSource) -> None:
        self._image = image
        self._period_ns = int(1e9 / config.rate)
        self._last = time.monotonic_ns() // self._period_ns
        self._left = config.frames

    def read(self, timeout_s: float) -> Captured | None:
        """The frame of the next trigger; late callers find the triggers they missed counted."""
        if self._left == 0:
            raise SourceError("the camera was unplugged (it was told to stop here)")
        now_ns = time.monotonic_ns()
        # One trigger may wait in the camera; older ones have been overwritten.
        trigger = max(self._last + 1, now_ns // self._period_ns)
        wait_s = (trigger * self._period_ns - now_ns) / 1e9
        if wait_s > timeout_s:
            time.sleep(timeout_s)
            return None
        time.sleep(max(0.0, wait_s))
        self._last = trigger
        self._left = None if self._left is None else self._left - 1
        return self._photograph(trigger)

    def _photograph(self, trigger: int) -> Captured:
        captured_ns = trigger * self._period_ns
        age_s = (time.monotonic_ns() - captured_ns) / 1e9
        pixels = self._image(trigger)
        good = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8
        if not good or pixels.ndim != 3 or pixels.shape[2] != 3:
            pixels, fault = None, "corrupt frame: the function gave no (height, width, 3) uint8"
        else:
            fault = None
        return Captured(
            pixels=pixels,
            captured_at=time.time() - age_s,
            captured_ns=captured_ns,
            counter=trigger,
            fault=fault,
        )

    def close(self) -> None:
        """Nothing to let go of."""


def open_synthetic(config: SyntheticSource) -> SyntheticCamera:
    """Import `file.py:function`. Raises SourceError where there is none."""
    place, _, name = config.target.partition(":")
    path = Path(place)
    spec = importlib.util.spec_from_file_location(f"lpvit_camera_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SourceError(f"{place}: no such Python file; write synthetic:file.py:function@rate")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise SourceError(f"{place} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise SourceError(f"{place} has no function {name!r}")
    return SyntheticCamera(function, config)
