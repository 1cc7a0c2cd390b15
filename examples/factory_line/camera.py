"""A camera over the factory line, for `lpvit run --source synthetic:.../camera.py:frame@30`."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from generate import LABELS, draw

_DEFECT_EVERY = 10  # parts
_PARTS = 240  # then they come again: drawing one takes milliseconds


def label_at(number: int) -> str:
    """What the part of that number is: one in ten has a defect, each kind in turn."""
    number %= _PARTS
    defects = [label for label in LABELS if label != "ok"]
    if number % _DEFECT_EVERY:
        return "ok"
    return defects[number // _DEFECT_EVERY % len(defects)]


def frame(number: int) -> npt.NDArray[np.uint8]:
    """The image (height, width, 3) of the part of that number."""
    return _drawn(number % _PARTS)


@lru_cache(maxsize=_PARTS)
def _drawn(number: int) -> npt.NDArray[np.uint8]:
    return draw(label_at(number), split="heldout", index=1_000_000 + number)
