"""From probabilities to a verdict, and from a verdict to what happens to the part."""

from typing import TYPE_CHECKING, Annotated

import msgspec

from lpvit_edge.errors import UnknownOptionError
from lpvit_edge.line.records import Action, Verdict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class VerdictRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The [verdict] table of line.toml."""

    accept: tuple[str, ...] = ("ok",)  # labels of good parts
    min_confidence: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0  # of an accepted part
    safe: Action = "reject"  # what happens to a part that could not be judged


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What the rule makes of one answer."""

    label: str
    confidence: float
    probabilities: tuple[float, ...]
    verdict: Verdict
    reason: str | None = None


def refuse_unknown_labels(rule: VerdictRule, labels: tuple[str, ...]) -> None:
    """Raise UnknownOptionError when the rule names a label that the model has not."""
    unknown = [name for name in rule.accept if name not in labels]
    if unknown or not rule.accept:
        raise UnknownOptionError(
            f"[verdict] accept = {list(rule.accept)}: the model has the labels {list(labels)}; "
            "name those of good parts"
        )


def judge(
    probabilities: "NDArray[np.float64]", labels: tuple[str, ...], rule: VerdictRule
) -> Judgement:
    """Probabilities (classes,) to a verdict: an accepted label with enough confidence is ok."""
    best = int(probabilities.argmax())
    label, confidence = labels[best], float(probabilities[best])
    verdict: Verdict = "ok"
    reason = None
    if label not in rule.accept:
        verdict, reason = "reject", f"label {label}"
    elif not confidence >= rule.min_confidence:  # NaN is below everything
        verdict = "reject"
        reason = f"confidence {confidence:.3f} is below {rule.min_confidence:g}"
    return Judgement(
        label=label,
        confidence=confidence,
        probabilities=tuple(float(p) for p in probabilities),
        verdict=verdict,
        reason=reason,
    )


def action_of(verdict: Verdict, rule: VerdictRule) -> Action:
    """What happens to the part."""
    if verdict == "safe":
        return rule.safe
    return "pass" if verdict == "ok" else "reject"
