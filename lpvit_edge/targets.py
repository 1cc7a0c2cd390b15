"""Whether what was asked for was reached, each target held against what was measured."""

from collections.abc import Mapping
from typing import Any

import msgspec

from lpvit_edge.budget import QUANTITIES
from lpvit_edge.records import Allocation, Check, EngineCheck

# A run of the same engine differs by a few percent from one minute to the next. Counted
# quantities (MACs, bytes) have no such excuse.
TARGET_TOLERANCE = 0.05
_COUNTED = frozenset({"macs", "weight_bytes"})


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One target: as asked, in its unit, as predicted, and as it came out.

    A share is held against the dense engine of the same run, everything else against itself.
    `met` is None, with a reason, where nothing could be measured.
    """

    quantity: str  # a key of lpvit_edge.budget.QUANTITIES
    asked: str
    limit: float
    predicted: float | None
    measured: float | None
    measured_share: float | None  # of the dense engine in the same run
    met: bool | None
    reason: str | None


def is_share(target: str) -> bool:
    """Whether a target is a share of the dense engine ("0.5x") and not an amount ("12ms")."""
    return target.strip().endswith("x")


def judge(
    asked: Mapping[str, str],
    limits: Mapping[str, float],
    allocation: Allocation,
    check: Check,
) -> tuple[Target, ...]:
    """Every target that was given, by the keys of lpvit_edge.budget.QUANTITIES."""
    return tuple(_judged(key, asked[key], limits[key], allocation, check) for key in asked)


def _judged(key: str, asked: str, limit: float, allocation: Allocation, check: Check) -> Target:
    dense, sparse = _measured(key, allocation, check)
    share = None if dense is None or sparse is None or dense == 0.0 else sparse / dense
    reached, allowed = (share, _share(asked)) if is_share(asked) else (sparse, limit)
    tolerance = 0.0 if key in _COUNTED else TARGET_TOLERANCE
    return Target(
        quantity=key,
        asked=asked,
        limit=limit,
        predicted=_predicted(key, allocation),
        measured=sparse,
        measured_share=share,
        met=None if reached is None else reached <= allowed * (1.0 + tolerance) + 1e-12,
        reason=check.sparse.energy.reason if reached is None else None,
    )


def _share(asked: str) -> float:
    return float(asked.strip().removesuffix("x"))


def _measured(key: str, allocation: Allocation, check: Check) -> tuple[float | None, float | None]:
    if key == "macs":  # counted, there is nothing to measure
        return allocation.dense_macs, allocation.macs
    return _of(check.dense, key), _of(check.sparse, key)


def _of(side: EngineCheck, key: str) -> float | None:
    return {
        "latency_ms": side.latency.median_ms,
        "energy_mj": side.energy.per_image_mj,
        "power_mw": side.energy.mean_power_mw,
        "weight_bytes": float(side.weight_bytes),
    }[key]


def _predicted(key: str, allocation: Allocation) -> float | None:
    return {
        "latency_ms": allocation.predicted_latency_ms,
        "energy_mj": allocation.predicted_energy_mj,
        "power_mw": allocation.predicted_power_mw,
        "macs": allocation.macs,
        "weight_bytes": allocation.predicted_weight_bytes,
    }[key]


def line(target: Mapping[str, Any]) -> str:
    """One target in words, from the document: met or not, and against what."""
    quantity = QUANTITIES[target["quantity"]]
    within = "" if target["quantity"] in _COUNTED else f" (within {100 * TARGET_TOLERANCE:.0f} %)"
    asked = f"{target['asked']} {'' if quantity.word == 'latency' else f'of {quantity.word} '}"
    if target["met"] is None:
        return f"target {asked}not judged: {target['reason'] or 'nothing was measured'}"
    verdict = f"target {asked}{'met' if target['met'] else 'NOT met'}{within}"
    if is_share(target["asked"]):
        counted = "" if target["quantity"] in _COUNTED else " of the same run"
        return f"{verdict}: {target['measured_share']:.2f}x of the dense {quantity.word}{counted}"
    how = "counted" if target["quantity"] in _COUNTED else "measured"
    return f"{verdict}: {quantity.text(target['measured'])} {how}"
