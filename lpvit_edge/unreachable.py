"""Why a budget cannot be met: which constraint, and the best that is reachable of each."""

import math
from collections.abc import Mapping

from lpvit_edge.budget import QUANTITIES
from lpvit_edge.errors import BudgetNotMetError
from lpvit_edge.knapsack import Constraints, Costs, least
from lpvit_edge.layer_options import Options, Picks
from lpvit_edge.network_cost import dense_totals, exceeding, total
from lpvit_edge.records import DeviceProfile


def refuse_unreachable(
    profile: DeviceProfile, options: Options, built: Constraints, budget: Mapping[str, float]
) -> None:
    """Raise BudgetNotMetError when no allocation keeps the whole budget."""
    alone = [c.name for c in built if not c.holds(_cheapest(c.costs))]
    if alone:
        said = [_alone(profile, options, key, budget[key]) for key in alone]
        raise BudgetNotMetError(f"{'; '.join(said)}; or try other --patterns")
    if len(built) > 1 and least(_nothing(options), built) is None:
        raise BudgetNotMetError(_together(profile, options, built, budget))


def _cheapest(costs: Costs) -> Picks:
    return tuple(min(range(len(layer)), key=layer.__getitem__) for layer in costs)


def _nothing(options: Options) -> Costs:
    return tuple((0.0,) * len(opts) for opts in options)


def _alone(profile: DeviceProfile, options: Options, key: str, limit: float) -> str:
    quantity = QUANTITIES[key]
    best, dense = reachable(profile, options, key, ()), dense_totals(profile)[key]
    assert best is not None, "without other constraints there always is one"
    unit, factor = quantity.shown
    remedy = f"{math.ceil(100 * best / factor) / 100:.2f}{unit}"
    if quantity.is_share_allowed and dense:
        remedy = f"{math.ceil(100 * best / dense) / 100:.2f}x"
    beside = f" (dense {quantity.text(dense)})" if dense else ""
    return (
        f"no allocation reaches {quantity.text(limit)} of {quantity.word}: {quantity.text(best)} "
        f"is the best that is reachable on this device{beside}; raise {quantity.option} to "
        f"{remedy} or more"
    )


def _together(
    profile: DeviceProfile, options: Options, built: Constraints, budget: Mapping[str, float]
) -> str:
    asked = [f"{QUANTITIES[key].word} {QUANTITIES[key].text(budget[key])}" for key in budget]
    reached = []
    for one in built:
        best = reachable(profile, options, one.name, [c for c in built if c is not one])
        quantity = QUANTITIES[one.name]
        value = "none, the others exclude each other" if best is None else quantity.text(best)
        reached.append(f"{quantity.option} {value}")
    return (
        f"no allocation keeps {' and '.join(asked)} together, though each alone can be kept. "
        f"The best of each that is reachable while the others are kept: {', '.join(reached)}. "
        "Raise one of them to that"
    )


def reachable(
    profile: DeviceProfile, options: Options, key: str, others: Constraints
) -> float | None:
    """The least value of a quantity under other constraints; None when they exclude each other.

    Mean power is a ratio and is minimized by Dinkelbach's iteration (1967): the picks of least
    E - P t for the best P so far, until P no longer falls.
    """

    def value(picks: Picks) -> float:
        chosen = [opts[pick] for opts, pick in zip(options, picks, strict=True)]
        found = total(profile, key, chosen)
        assert found is not None, "constraints are built of what was measured"
        return found

    if key != "power_mw":
        costs = tuple(tuple(float(getattr(o, key)) for o in opts) for opts in options)
        picks = least(costs, others)
        return None if picks is None else value(picks)
    picks = least(_nothing(options), others)
    best = math.inf
    while picks is not None and value(picks) < best * (1.0 - 1e-9):
        best = value(picks)
        watts = best / 1000.0
        costs = tuple(tuple(exceeding(o, watts) for o in opts) for opts in options)
        picks = least(costs, others)
    return None if math.isinf(best) else best
