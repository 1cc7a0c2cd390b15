"""Spread sparsity over the layers: one pattern and sparsity for each, within a latency budget.

A multiple-choice knapsack: minimize the summed distortion so that the predicted latency stays
within the budget. "milp" solves it exactly; "slope" is LPViT's search for one slope over all
layers (arXiv 2407.02068), with the power term replaced by measured latency; "uniform" gives every
layer the same form. A form that is not faster than dense on this device is no option.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import msgspec
import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.errors import BudgetNotMetError, MismatchError
from lpvit_edge.records import (
    Allocation,
    Choice,
    DeviceProfile,
    GemmCost,
    LayerShape,
    Sensitivity,
    SensitivityCurve,
)

SPARSITIES = tuple(round(0.05 * step, 2) for step in range(1, 20))


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One form of one layer with its predicted latency and distortion."""

    pattern: str
    sparsity: float
    latency_ms: float
    distortion: float


Options = tuple[tuple[Option, ...], ...]  # per layer, the dense form first
Picks = tuple[int, ...]  # per layer, the index of the chosen option


def allocate(
    profile: DeviceProfile,
    sensitivity: Sensitivity,
    *,
    budget_ms: float,
    allocator: str = "milp",
    criterion: str = "hessian",
    patterns: tuple[str, ...] | None = None,
) -> Allocation:
    """Choose a form for every layer. Raises BudgetNotMetError with the best that is reachable."""
    refuse_mismatch(profile, sensitivity)
    options = layer_options(profile, sensitivity, criterion=criterion, patterns=patterns)
    fastest = profile.rest_ms + sum(min(o.latency_ms for o in opts) for opts in options)
    if fastest > budget_ms:
        dense_ms = profile.dense.median_ms
        raise BudgetNotMetError(
            f"no allocation reaches {budget_ms:.3f} ms: {fastest:.3f} ms is the best that is "
            f"reachable on this device (dense {dense_ms:.3f} ms); raise --target-latency to "
            f"{math.ceil(100 * fastest / dense_ms) / 100:.2f}x or more, or try other --patterns"
        )
    picks = ALLOCATORS[allocator](options, budget_ms - profile.rest_ms)
    return _allocation(profile, options, picks, budget_ms, allocator, criterion)


def refuse_mismatch(profile: DeviceProfile, sensitivity: Sensitivity) -> None:
    """Raise MismatchError naming what differs between the two models."""
    a, b = profile.model, sensitivity.model
    different = [
        f"{field} is {getattr(a, field)!r} in the profile and {getattr(b, field)!r} in the curves"
        for field in ("name", "weights_sha256", "image_size")
        if getattr(a, field) != getattr(b, field)
    ]
    if different:
        raise MismatchError(
            f"the device profile is of another model: {'; '.join(different)}. Profile this model "
            "with `lpvit profile`"
        )


def layer_options(
    profile: DeviceProfile,
    sensitivity: Sensitivity,
    *,
    criterion: str,
    patterns: tuple[str, ...] | None = None,
) -> Options:
    """For each layer the dense form and every sparse one that is faster on this device."""
    costs = _costs(profile)
    curves = {(c.layer, c.pattern): c for c in sensitivity.curves if c.criterion == criterion}
    return tuple(tuple(_options(layer, costs, curves, patterns)) for layer in profile.layers)


_Key = tuple[int, int, int, str]


def _key(part: LayerShape | GemmCost) -> _Key:
    return part.tokens, part.in_features, part.out_features, part.activation


def _costs(profile: DeviceProfile) -> dict[_Key, dict[str, list[GemmCost]]]:
    costs: dict[_Key, dict[str, list[GemmCost]]] = {}
    for gemm in profile.gemms:
        costs.setdefault(_key(gemm), {}).setdefault(gemm.pattern, []).append(gemm)
    return costs


def _options(
    layer: LayerShape,
    costs: Mapping[_Key, Mapping[str, list[GemmCost]]],
    curves: Mapping[tuple[str, str], SensitivityCurve],
    patterns: tuple[str, ...] | None,
) -> Iterator[Option]:
    measured = costs[_key(layer)]
    dense_ms = measured["dense"][0].latency_ms
    yield Option(pattern="dense", sparsity=0.0, latency_ms=dense_ms, distortion=0.0)
    for pattern, gemms in measured.items():
        curve = curves.get((layer.name, pattern))
        if curve is None or (patterns is not None and pattern not in patterns):
            continue
        latency_at = interpolated_latency(gemms)
        for sparsity in SPARSITIES:
            latency_ms = latency_at(sparsity)
            if latency_ms < dense_ms and sparsity <= curve.sparsity[-1]:
                distortion = float(np.interp(sparsity, curve.sparsity, curve.distortion))
                yield Option(
                    pattern=pattern,
                    sparsity=sparsity,
                    latency_ms=latency_ms,
                    distortion=distortion,
                )


def interpolated_latency(gemms: list[GemmCost]) -> Callable[[float], float]:
    """Latency over sparsity between the measured points, made to fall (more zeros, less work).

    Below the lowest measured sparsity it is infinite, so that nothing unmeasured is chosen.
    """
    ordered = sorted(gemms, key=lambda gemm: gemm.sparsity)
    sparsity = [gemm.sparsity for gemm in ordered]
    falling = never_rising([gemm.latency_ms for gemm in ordered])
    return lambda s: float(np.interp(s, sparsity, falling)) if s >= sparsity[0] else np.inf


def never_rising(values: list[float]) -> list[float]:
    """The sequence that never rises and is nearest in least squares (pool adjacent violators).

    A running minimum would be simpler, and would carry the luckiest measurement on to everything
    after it: predictions would come out too fast.

    >>> never_rising([8.0, 5.0, 6.0, 1.0])
    [8.0, 5.5, 5.5, 1.0]
    """
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and _mean(pools[-2]) < _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [_mean(pool) for pool in pools for _ in pool]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def by_milp(options: Options, budget_ms: float) -> Picks:
    """The exact optimum, by scipy's HiGHS."""
    optimize, sparse = require("scipy.optimize"), require("scipy.sparse")
    flat = [option for opts in options for option in opts]
    counts = [len(opts) for opts in options]
    owner = np.repeat(np.arange(len(options)), counts)
    one_each = sparse.csr_array(
        (np.ones(len(flat)), (owner, np.arange(len(flat)))), shape=(len(options), len(flat))
    )
    distortion = np.array([option.distortion for option in flat])
    latency = np.array([[option.latency_ms for option in flat]])
    result = optimize.milp(
        distortion / max(distortion.max(), 1e-300),
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(latency, -np.inf, budget_ms),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    if result.x is None:
        raise BudgetNotMetError(f"no allocation found ({result.message})")
    starts = np.cumsum([0, *counts[:-1]])
    return tuple(
        int(np.argmax(result.x[start : start + count]))
        for start, count in zip(starts, counts, strict=True)
    )


def by_slope(options: Options, budget_ms: float) -> Picks:
    """The gentlest slope, the same for all layers, whose allocation fits the budget."""
    low, high = 0.0, 1.0
    while _total_ms(options, _at_slope(options, high)) > budget_ms:
        high *= 4.0
        if high > 1e30:
            return tuple(
                min(range(len(opts)), key=lambda i: opts[i].latency_ms) for opts in options
            )
    for _ in range(100):
        middle = (low + high) / 2
        fits = _total_ms(options, _at_slope(options, middle)) <= budget_ms
        low, high = (low, middle) if fits else (middle, high)
    return _at_slope(options, high)


def _at_slope(options: Options, slope: float) -> Picks:
    return tuple(
        min(range(len(opts)), key=lambda i: opts[i].distortion + slope * opts[i].latency_ms)
        for opts in options
    )


def _total_ms(options: Options, picks: Picks) -> float:
    return sum(opts[pick].latency_ms for opts, pick in zip(options, picks, strict=True))


def by_uniform(options: Options, budget_ms: float) -> Picks:
    """The lowest sparsity that, in one pattern for all layers that gain by it, fits the budget.

    All dense when that fits. Raises BudgetNotMetError when even the highest sparsity does not.
    """
    if sum(opts[0].latency_ms for opts in options) <= budget_ms:
        return (0,) * len(options)
    patterns = sorted({o.pattern for opts in options for o in opts} - {"dense"})
    fitting = []
    for pattern in patterns:
        for sparsity in SPARSITIES:
            picks = tuple(_index(opts, pattern, sparsity) for opts in options)
            if _total_ms(options, picks) <= budget_ms:
                distortion = sum(o[p].distortion for o, p in zip(options, picks, strict=True))
                fitting.append((distortion, picks))
                break
    if not fitting:
        raise BudgetNotMetError(
            f"no uniform sparsity up to {SPARSITIES[-1]} fits; use --allocator milp"
        )
    return min(fitting)[1]


def _index(options: tuple[Option, ...], pattern: str, sparsity: float) -> int:
    matches = [i for i, o in enumerate(options) if o.pattern == pattern and o.sparsity == sparsity]
    return matches[0] if matches else 0


ALLOCATORS: dict[str, Callable[[Options, float], Picks]] = {
    "milp": by_milp,
    "slope": by_slope,
    "uniform": by_uniform,
}


def _allocation(
    profile: DeviceProfile,
    options: Options,
    picks: Picks,
    budget_ms: float,
    allocator: str,
    criterion: str,
) -> Allocation:
    chosen = [opts[pick] for opts, pick in zip(options, picks, strict=True)]
    predicted_ms = profile.rest_ms + sum(option.latency_ms for option in chosen)
    choices = tuple(
        Choice(
            layer=layer.name,
            pattern=option.pattern,
            sparsity=option.sparsity,
            latency_ms=option.latency_ms,
            dense_latency_ms=opts[0].latency_ms,
            distortion=option.distortion,
        )
        for layer, option, opts in zip(profile.layers, chosen, options, strict=True)
    )
    return Allocation(
        model=profile.model,
        fingerprint=profile.fingerprint,
        allocator=allocator,
        criterion=criterion,
        budget={"latency_ms": budget_ms},
        choices=choices,
        predicted_latency_ms=predicted_ms,
        predicted_dense_ms=profile.rest_ms + sum(opts[0].latency_ms for opts in options),
        distortion=sum(option.distortion for option in chosen),
        bound="latency" if any(c.pattern != "dense" for c in choices) else "none",
    )
