"""What kind of change it is: the lamp, the lens, the material, or something never seen.

A table of shapes, not a learned model: each cause moves the image statistics in a direction that
follows from optics, and a kind of defect that is new moves none of them.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Cause = Literal["light", "focus", "material", "unknown content", "class mix"]

TEXT: dict[Cause, str] = {
    "light": "the brightness changed and nothing else: look at lamp, exposure and aperture",
    "focus": "fine detail changed, the brightness did not: look at focus, lens and vibration",
    "material": "colour, texture and brightness changed together: another material or product",
    "unknown content": "the light and the lens are as before but the content is new to the model: "
    "a kind of part or defect that it was not trained on",
    "class mix": "a class comes more often than before: that defect has become frequent, or a new "
    "kind of defect is taken for it; label the sample",
}
# Directions in standard deviations of (brightness, contrast, sharpness, redness, blueness).
_LIGHT = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
_FOCUS = np.array([0.0, 0.6, 0.8, 0.0, 0.0])
_ALIKE = 0.8  # cosine between the change and a direction
_LEAST = 0.25  # standard deviations by which all frames must have moved
_STRANGE = 0.75  # and those that are strange to the model, to be of another material
_CHI_SQUARE = 9.0  # 97 % of chi-square with three degrees of freedom
_OF_MATERIAL = [0, 3, 4]  # a defect changes detail and contrast, but hardly brightness and colour


def diagnose(shifts: "NDArray[np.float64]", strange: "NDArray[np.bool_]") -> Cause:
    """Cause of a change from the frames since it began.

    shifts (n, 5): image statistics less those of the reference, in its standard deviations.
    strange (n,): whether the embedding is far from the reference.
    """
    moved = shifts.mean(axis=0)
    if float(np.linalg.norm(moved)) >= _LEAST:
        if _cosine(moved, _LIGHT) >= _ALIKE:
            return "light"
        if _cosine(moved, _FOCUS) >= _ALIKE:
            return "focus"
    changed = shifts[strange] if strange.any() else shifts
    size = float(np.square(changed.mean(axis=0)[_OF_MATERIAL]).sum())
    noise = _CHI_SQUARE / len(changed)  # what the mean of usual frames stays below
    return "material" if size - noise >= _STRANGE**2 else "unknown content"


def _cosine(shift: "NDArray[np.float64]", direction: "NDArray[np.float64]") -> float:
    return abs(float(shift @ direction / (np.linalg.norm(shift) * np.linalg.norm(direction))))
