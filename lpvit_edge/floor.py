"""The accuracy floor: what must hold, when it does, and the search for the strongest that does.

Each step of the search is one allocation, pruned, repaired, and run over all held-out images. At
most STEPS are judged, each with an error of (1 - CONFIDENCE) / STEPS, so that the chance that any
step is kept whose true accuracy lies below the floor is at most 1 - CONFIDENCE (Bonferroni),
however the search chooses its steps.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import msgspec

from lpvit_edge.confidence import one_sided_z, tango_upper, wilson
from lpvit_edge.errors import AccuracyFloorError, DataError, UnknownOptionError
from lpvit_edge.records import Check, ModelIdentity, Part, Record

CONFIDENCE = 0.95
STEPS = 6
_Z = one_sided_z(1.0 - (1.0 - CONFIDENCE) / STEPS)
_IMAGES_LIMIT = 10_000_000


class Floor(Part, frozen=True, kw_only=True):
    """What the accuracy (a fraction) must not fall below, or by, or both."""

    accuracy: float | None = None
    max_drop: float | None = None  # from the dense model, a fraction


class Paired(Part, frozen=True, kw_only=True):
    """Answers of the dense and the pruned model on the same images."""

    images: int
    dense_correct: int
    correct: int
    lost: int  # right by the dense model only
    won: int  # right by the pruned model only


class Verdict(Part, frozen=True, kw_only=True):
    """Whether a floor holds, and the one-sided bounds by which it was judged."""

    holds: bool
    accuracy_low: float  # the accuracy is at least this
    drop_high: float  # the drop is at most this


class FloorStep(Part, frozen=True, kw_only=True):
    """One allocation that was pruned and judged."""

    strength: float  # 0 dense, 1 the target (or the fastest form of every layer)
    budget: dict[str, float]
    predicted_latency_ms: float
    predicted_share: float  # of the predicted dense latency
    distortion: float
    allocation_sha256: str
    answers: Paired
    verdict: Verdict
    seconds: float


class FloorSearch(Record, frozen=True, kw_only=True):
    """The steps so far, in the order in which they were tried."""

    KIND: ClassVar[str] = "accuracy-floor"

    model: ModelIdentity
    calibration_sha256: str
    heldout_sha256: str
    floor: Floor
    confidence: float
    tests: int  # over how many steps the error is spread
    steps: tuple[FloorStep, ...]


def floor_of(accuracy: float | None, max_drop_points: float | None) -> Floor | None:
    """The floor from the options --accuracy-floor (a fraction) and --max-drop (points)."""
    if accuracy is None and max_drop_points is None:
        return None
    if accuracy is not None and not 0.0 < accuracy < 1.0:
        raise UnknownOptionError(f"--accuracy-floor {accuracy}: write a fraction such as 0.95")
    if max_drop_points is not None and not 0.0 < max_drop_points < 100.0:
        raise UnknownOptionError(f"--max-drop {max_drop_points}: write points such as 1.0")
    return Floor(
        accuracy=accuracy, max_drop=None if max_drop_points is None else max_drop_points / 100
    )


def judge(floor: Floor, answers: Paired) -> Verdict:
    """Whether the floor holds with confidence: Wilson's bound, and Tango's for a drop."""
    low = wilson(answers.correct, answers.images, z=_Z)[0]
    high = tango_upper(answers.lost, answers.won, answers.images, z=_Z)
    return Verdict(holds=_holds(floor, low, high), accuracy_low=low, drop_high=high)


def _holds(floor: Floor, accuracy_low: float, drop_high: float) -> bool:
    return (floor.accuracy is None or accuracy_low >= floor.accuracy) and (
        floor.max_drop is None or drop_high <= floor.max_drop
    )


def images_needed(floor: Floor, answers: Paired) -> int | None:
    """How many images with the same shares of answers would hold the floor; None: no number."""

    def holds(images: int) -> bool:
        scale = images / answers.images
        low = wilson(answers.correct * scale, images, z=_Z)[0]
        high = tango_upper(answers.lost * scale, answers.won * scale, images, z=_Z)
        return _holds(floor, low, high)

    enough = answers.images
    while not holds(enough):
        enough *= 2
        if enough > _IMAGES_LIMIT:
            return None
    few = enough // 2
    while enough - few > max(1, enough // 100):
        middle = (few + enough) // 2
        few, enough = (few, middle) if holds(middle) else (middle, enough)
    return enough


def refuse_unprovable(floor: Floor, images: int) -> None:
    """Raise AccuracyFloorError when so few images prove nothing, even with every answer right."""
    best = Paired(images=images, dense_correct=images, correct=images, lost=0, won=0)
    if not judge(floor, best).holds:
        needed = images_needed(floor, best)
        raise AccuracyFloorError(
            f"{images} held-out images cannot prove {words(floor)} with {CONFIDENCE:.0%} "
            f"confidence, even if every answer were right; give {needed} or more"
        )


def refuse_dense_below(floor: Floor, dense: Paired) -> None:
    """Raise AccuracyFloorError when the model fails the floor before it is pruned."""
    verdict = judge(floor, dense)
    if not verdict.holds:
        raise AccuracyFloorError(
            f"the dense model itself does not hold {words(floor)}: {described(dense, verdict)}. "
            f"{_what_helps(floor, dense)}"
        )


def refuse_all_below(search: FloorSearch) -> None:
    """Raise AccuracyFloorError, with every step's accuracy, when none is kept."""
    if any(step.verdict.holds for step in search.steps):
        return
    weakest = min(search.steps, key=lambda step: step.strength)
    tried = "; ".join(
        f"{step.predicted_share:.2f}x: {described(step.answers, step.verdict)}"
        for step in sorted(search.steps, key=lambda step: -step.strength)
    )
    dense = weakest.answers.dense_correct / weakest.answers.images
    raise AccuracyFloorError(
        f"even the weakest step breaks {words(search.floor)} (dense {100 * dense:.2f} %). Tried, "
        f"by predicted share of the dense latency: {tried}. "
        f"{_what_helps(search.floor, weakest.answers)}"
    )


def _what_helps(floor: Floor, answers: Paired) -> str:
    needed = images_needed(floor, answers)
    if needed is None:
        return (
            "More held-out images would not help, the measured accuracy itself is below: lower the "
            "floor, give more --images for calibration, or other --patterns"
        )
    return (
        f"With the same shares of answers, {needed} held-out images instead of {answers.images} "
        "would prove it"
    )


def words(floor: Floor) -> str:
    """The floor in words.

    >>> words(Floor(accuracy=0.95, max_drop=0.01))
    'an accuracy of at least 95 % and a drop of at most 1 points'
    """
    parts = []
    if floor.accuracy is not None:
        parts.append(f"an accuracy of at least {100 * floor.accuracy:g} %")
    if floor.max_drop is not None:
        parts.append(f"a drop of at most {100 * floor.max_drop:g} points")
    return " and ".join(parts)


def described(answers: Paired, verdict: Verdict) -> str:
    """Accuracy and drop as measured, with their bounds."""
    drop = (answers.dense_correct - answers.correct) / answers.images
    return (
        f"{100 * answers.correct / answers.images:.2f} % (at least "
        f"{100 * verdict.accuracy_low:.2f}), drop {100 * drop:+.2f} points (at most "
        f"{100 * verdict.drop_high:.2f})"
    )


def outcome(search: FloorSearch, check: Check) -> dict[str, Any]:
    """For the document: what was asked, every step, and the verdict on the engines' own answers.

    The engines answer the same images as the search, so the verdict has the same confidence.
    """
    if check.dense.correct is None or check.sparse.correct is None:
        raise DataError("an accuracy floor needs labelled held-out images")
    answers = Paired(
        images=check.sparse.images,
        dense_correct=check.dense.correct,
        correct=check.sparse.correct,
        lost=check.lost or 0,
        won=check.won or 0,
    )
    verdict = judge(search.floor, answers)
    return {
        **msgspec.to_builtins(search.floor),
        "asked": words(search.floor),
        "confidence": search.confidence,
        "tests": search.tests,
        "held": verdict.holds,
        "accuracy_low": verdict.accuracy_low,
        "drop_high": verdict.drop_high,
        "steps": [_step(step) for step in search.steps],
    }


def _step(step: FloorStep) -> dict[str, Any]:
    return {
        "predicted_share": step.predicted_share,
        "accuracy": step.answers.correct / step.answers.images,
        "accuracy_low": step.verdict.accuracy_low,
        "drop": (step.answers.dense_correct - step.answers.correct) / step.answers.images,
        "drop_high": step.verdict.drop_high,
        "images": step.answers.images,
        "kept": step.verdict.holds,
    }


def line(found: Mapping[str, Any]) -> str:
    """The outcome in one line, from the document."""
    steps = len(found["steps"])
    return (
        f"accuracy floor {'held' if found['held'] else 'BROKEN'}: asked for {found['asked']}; with "
        f"{100 * found['confidence']:.0f} % confidence, over {steps} step{'s' * (steps != 1)}, "
        f"accuracy is at least {100 * found['accuracy_low']:.2f} % and the drop at most "
        f"{100 * found['drop_high']:.2f} points"
    )


def bisect(holds: Callable[[float], bool], *, first: float) -> float:
    """The largest strength that was tried and holds, 0.0 when none did, in at most STEPS tries."""
    low, high, strength = 0.0, math.inf, first
    for _ in range(STEPS):
        if holds(strength):
            low = strength
        else:
            high = strength
        if low == 1.0:
            break
        strength = (low + min(high, 1.0)) / 2
    return low
