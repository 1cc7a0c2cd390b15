"""Forms for every layer at a given share of the MACs, without a device profile.

The benchmark's accuracy grid asks for sparsity, not for milliseconds: the constraint is MACs, and
latency, which no option states, is not a number.
"""

import math
from collections.abc import Iterator

from benchmarks.pruning_subject import Subject
from lpvit_edge.knapsack import ALLOCATORS, Constraint, distortion
from lpvit_edge.layer_options import SPARSITIES, Option, macs, weight_bytes
from lpvit_edge.pattern import TWO_FOUR_SPARSITY, Pattern
from lpvit_edge.prune import Form
from lpvit_edge.records import LayerShape, SensitivityCurve

Forms = dict[str, Form]


def uniform_forms(subject: Subject, pattern: Pattern, sparsity: float) -> Forms:
    """The same form for every layer that the pattern divides."""
    if pattern.kind == "2:4" and sparsity != TWO_FOUR_SPARSITY:
        raise ValueError(f"2:4 has one sparsity only, {TWO_FOUR_SPARSITY}, not {sparsity}")
    form = Form(pattern=pattern, sparsity=sparsity)
    return {layer.name: form for layer in subject.fitting(pattern)}


def allocated_forms(
    subject: Subject, pattern: Pattern, sparsity: float, *, criterion: str, allocator: str
) -> tuple[Forms, float]:
    """Forms of least summed distortion with (1 - sparsity) of the dense MACs, and that sum."""
    curves = {
        curve.layer: curve
        for curve in subject.curves
        if curve.criterion == criterion and curve.pattern == str(pattern)
    }
    layers = subject.walk.layers
    options = tuple(tuple(_options(layer, curves.get(layer.name))) for layer in layers)
    costs = tuple(tuple(option.macs for option in opts) for opts in options)
    limit = (1.0 - sparsity) * sum(opts[0].macs for opts in options)
    constraint = Constraint(name="macs", costs=costs, limit=limit)
    picks = ALLOCATORS[allocator](options, (constraint,))
    chosen = {
        layer.name: opts[pick] for layer, opts, pick in zip(layers, options, picks, strict=True)
    }
    forms = {
        name: Form(pattern=pattern, sparsity=option.sparsity)
        for name, option in chosen.items()
        if option.sparsity > 0.0
    }
    return forms, distortion(options, picks)


def _options(layer: LayerShape, curve: SensitivityCurve | None) -> Iterator[Option]:
    yield _option(layer, "dense", 0.0, 0.0)
    if curve is not None:
        at = dict(zip(curve.sparsity, curve.distortion, strict=True))
        for sparsity in SPARSITIES:
            if sparsity in at:
                yield _option(layer, curve.pattern, sparsity, at[sparsity])


def _option(layer: LayerShape, pattern: str, sparsity: float, distortion: float) -> Option:
    return Option(
        pattern=pattern,
        sparsity=sparsity,
        latency_ms=math.nan,
        energy_mj=None,
        macs=macs(layer, sparsity),
        weight_bytes=weight_bytes(layer, pattern, sparsity),
        distortion=distortion,
    )
