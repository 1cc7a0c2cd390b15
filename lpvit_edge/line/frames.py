"""What travels through the line: a frame, and the part that nobody could see."""

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """What a source gives: pixels (height, width, 3) RGB uint8, and when the light fell on them.

    `pixels` is None for a frame that arrived corrupt, and `fault` says how. `counter` is the
    camera's own running number, where it has one: a jump in it means frames that were never handed
    over. `name` identifies the part outside (a file's name, a part number).
    """

    pixels: "NDArray[np.uint8] | None"
    captured_at: float  # seconds since 1970, UTC
    captured_ns: int  # CLOCK_MONOTONIC
    counter: int | None = None
    name: str | None = None
    fault: str | None = None


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """A numbered frame on its way to the engine.

    `pixels` is None for a part that was triggered and never seen, and `lost` says why. Where nobody
    knows when that was it is `untimed`, and both times are those at which it was noticed.
    """

    number: int
    captured_at: float
    captured_ns: int
    received_ns: int
    pixels: "NDArray[np.uint8] | None" = None
    name: str | None = None
    lost: str | None = None
    untimed: bool = False
