"""One option per layer, the least distortion, every constraint kept: three ways to choose.

"milp" solves the multiple-choice knapsack exactly; "slope" is LPViT's search for one slope over
all layers (arXiv 2407.02068), its power model replaced by the constrained costs; "uniform" gives
every layer the same form. All take the same arguments and give the same thing.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.errors import BudgetNotMetError
from lpvit_edge.layer_options import SPARSITIES, Option, Options, Picks

if TYPE_CHECKING:
    from numpy.typing import NDArray

Costs = tuple[tuple[float, ...], ...]  # per layer and option
_SLACK = 1e-6  # of the largest cost: what HiGHS takes for equal


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """The costs of the chosen options must not sum to more than the limit."""

    name: str  # a key of lpvit_edge.budget.QUANTITIES
    costs: Costs
    limit: float

    def total(self, picks: Picks) -> float:
        """Summed cost of one option per layer."""
        return sum(costs[pick] for costs, pick in zip(self.costs, picks, strict=True))

    def holds(self, picks: Picks) -> bool:
        """Whether the picks keep the limit, to the accuracy of the solver."""
        return self.total(picks) <= self.limit + _SLACK * _largest(self.costs)


Constraints = Sequence[Constraint]


def _largest(costs: Costs) -> float:
    return max((abs(cost) for layer in costs for cost in layer), default=0.0) or 1.0


def distortion(options: Options, picks: Picks) -> float:
    """Summed distortion of one option per layer."""
    return sum(opts[pick].distortion for opts, pick in zip(options, picks, strict=True))


def by_milp(options: Options, constraints: Constraints) -> Picks:
    """The exact optimum. Raises BudgetNotMetError when no picks keep every constraint."""
    costs = tuple(tuple(option.distortion for option in opts) for opts in options)
    picks = least(costs, constraints)
    if picks is None:
        raise BudgetNotMetError("no allocation keeps every constraint")
    return picks


def least(costs: Costs, constraints: Constraints) -> Picks | None:
    """The picks of least summed cost that keep the constraints (scipy's HiGHS), or None.

    HiGHS stops within an absolute gap. Distortions span many orders of magnitude, so the costs
    are scaled by the best total found so far until the optimum is of the order of one.
    """
    scale = _largest(costs)
    while True:
        picks = _solve(costs, constraints, scale)
        if picks is None:
            return None
        total = sum(layer[pick] for layer, pick in zip(costs, picks, strict=True))
        if abs(total) > 0.01 * scale or abs(total) <= 1e-15 * _largest(costs):
            return picks
        scale = abs(total)


def _solve(costs: Costs, constraints: Constraints, scale: float) -> Picks | None:
    optimize, sparse = require("scipy.optimize"), require("scipy.sparse")
    counts = [len(layer) for layer in costs]
    flat = np.concatenate([np.asarray(layer, float) for layer in costs]) / scale
    owner = np.repeat(np.arange(len(costs)), counts)
    one_each = sparse.csr_array(
        (np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(costs), len(flat))
    )
    rows = [optimize.LinearConstraint(one_each, 1, 1)]
    for constraint in constraints:
        unit = _largest(constraint.costs)
        row = np.concatenate([np.asarray(layer, float) for layer in constraint.costs]) / unit
        rows.append(optimize.LinearConstraint(row[None], -np.inf, constraint.limit / unit))
    result = optimize.milp(
        flat,
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, _useful(flat)),
        constraints=rows,
        options={"mip_rel_gap": 1e-6},
    )
    if result.x is None:
        return None
    starts = np.cumsum([0, *counts[:-1]])
    return tuple(
        int(np.argmax(result.x[start : start + count]))
        for start, count in zip(starts, counts, strict=True)
    )


def _useful(flat: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Upper bounds: where no cost is negative, none above the best total is in the optimum."""
    return np.where(flat <= 1.0 + 1e-9, 1.0, 0.0) if flat.min() >= 0.0 else np.ones(len(flat))


def by_slope(options: Options, constraints: Constraints) -> Picks:
    """The gentlest slope, the same for all layers, whose picks keep every constraint.

    With several constraints the slope is over the sum of their costs, each as a share of what the
    dense layers cost. Raises BudgetNotMetError when even the steepest does not keep them.
    """
    prices = _prices(options, constraints)

    def keeps(slope: float) -> bool:
        picks = _at_slope(options, prices, slope)
        return all(constraint.holds(picks) for constraint in constraints)

    low, high = 0.0, 1.0
    while not keeps(high):
        high *= 4.0
        if high > 1e60:
            raise BudgetNotMetError(
                "no slope, however steep, keeps every constraint; use --allocator milp"
            )
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return _at_slope(options, prices, high)


def _prices(options: Options, constraints: Constraints) -> list[list[float]]:
    units = [sum(abs(layer[0]) for layer in c.costs) or 1.0 for c in constraints]
    return [
        [
            sum(c.costs[index][pick] / unit for c, unit in zip(constraints, units, strict=True))
            for pick in range(len(opts))
        ]
        for index, opts in enumerate(options)
    ]


def _at_slope(options: Options, prices: list[list[float]], slope: float) -> Picks:
    return tuple(
        min(range(len(opts)), key=lambda i: opts[i].distortion + slope * price[i])
        for opts, price in zip(options, prices, strict=True)
    )


def by_uniform(options: Options, constraints: Constraints) -> Picks:
    """The lowest sparsity that, in one pattern for all layers that gain by it, keeps the limits.

    All dense when that does. Raises BudgetNotMetError when even the highest sparsity does not.
    """
    dense = (0,) * len(options)
    if all(constraint.holds(dense) for constraint in constraints):
        return dense
    patterns = sorted({o.pattern for opts in options for o in opts} - {"dense"})
    fitting = []
    for pattern in patterns:
        for sparsity in SPARSITIES:
            picks = tuple(_index(opts, pattern, sparsity) for opts in options)
            if all(constraint.holds(picks) for constraint in constraints):
                fitting.append((distortion(options, picks), picks))
                break
    if not fitting:
        raise BudgetNotMetError(
            f"no uniform sparsity up to {SPARSITIES[-1]} fits; use --allocator milp"
        )
    return min(fitting)[1]


def _index(options: tuple[Option, ...], pattern: str, sparsity: float) -> int:
    matches = [i for i, o in enumerate(options) if o.pattern == pattern and o.sparsity == sparsity]
    return matches[0] if matches else 0


Allocator = Callable[[Options, Constraints], Picks]
ALLOCATORS: dict[str, Allocator] = {"milp": by_milp, "slope": by_slope, "uniform": by_uniform}
