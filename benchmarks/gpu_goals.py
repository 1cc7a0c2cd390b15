"""The goals that were set before any GPU was at hand, and whether rows meet them.

They are for a card of the H200's class, float16, batch 8 and more. A goal over several layers is
met where the layer that gains least meets it. 1.79x and 1.4x are LPViT's own GPU figures
(arXiv 2407.02068).
"""

from collections.abc import Sequence

from benchmarks.gpu_records import Goal, KernelRow, ModelRow
from benchmarks.gpu_rounds import Spread

SMALLEST_BATCH = 8
WIDE = ("qkv", "fc1", "fc2")
COARSE = ("ours 64x64", "ours 64x32")
NOT_MEASURED = "not measured"


def kernel_goals(rows: Sequence[KernelRow]) -> tuple[Goal, ...]:
    """1.3x and 2x over cuBLAS, 1.5x over torch's block-sparse kernel."""
    ours = [row for row in rows if row.batch >= SMALLEST_BATCH and row.kernel.startswith(COARSE)]
    wide = [row for row in ours if row.layer.split()[-1] in WIDE]
    half = [row for row in wide if row.density == 0.5]
    third = [row for row in wide if row.density == 0.3]
    return (
        _least("over cuBLAS, half of the 64x64 or 64x32 blocks", 1.3, half, "over_dense"),
        _least("over cuBLAS at 70 % sparsity", 2.0, third, "over_dense"),
        _least("over torch's bsr_dense_addmm", 1.5, half + third, "over_bsr"),
    )


def _least(text: str, wanted: float, rows: Sequence[KernelRow], gain: str) -> Goal:
    """Of each layer, batch and density the better block counts; of these, the smallest gain."""
    best: dict[tuple[str, int, float | None], tuple[Spread, str]] = {}
    for row in rows:
        found: Spread | None = getattr(row, gain)
        place = (row.layer, row.batch, row.density)
        if found is None:
            return _unmeasured(text, wanted, f"{row.layer} batch {row.batch} {row.kernel}")
        if place not in best or found.median > best[place][0].median:
            best[place] = (found, f"{row.layer} batch {row.batch} {row.kernel}")
    if not best:
        return _unmeasured(text, wanted, None)
    spread, where = min(best.values(), key=lambda pair: pair[0].median)
    return Goal(goal=text, wanted=wanted, found=spread, where=where, verdict=_met(spread, wanted))


def model_goals(rows: Sequence[ModelRow]) -> tuple[Goal, ...]:
    """1.79x in time and 1.4x in energy for the whole model, by the contestant that gains most. No
    accuracy is measured here, so that they are met can only be said together with it."""
    ours = [row for row in rows if row.batch >= SMALLEST_BATCH and row.model.startswith("ours")]
    return (
        _most("whole model, time", 1.79, [(row.over_dense, row) for row in ours]),
        _most("whole model, energy an image", 1.4, [(row.energy_over_dense, row) for row in ours]),
    )


def _most(text: str, wanted: float, gains: Sequence[tuple[Spread | None, ModelRow]]) -> Goal:
    measured = [(found, row) for found, row in gains if found is not None]
    if not measured:
        return _unmeasured(text, wanted, None)
    found, row = max(measured, key=lambda pair: pair[0].median)
    reached = "reached, if accuracy holds there" if found.median >= wanted else "missed"
    where = f"{row.model} batch {row.batch}"
    return Goal(goal=text, wanted=wanted, found=found, where=where, verdict=reached)


def _met(found: Spread, wanted: float) -> str:
    if found.median < wanted:
        return "missed"
    return "met" if found.low >= wanted else "met by the median, not by the lower quartile"


def _unmeasured(text: str, wanted: float, where: str | None) -> Goal:
    return Goal(goal=text, wanted=wanted, found=None, where=where, verdict=NOT_MEASURED)
