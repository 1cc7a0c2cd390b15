"""The networks to compare at equal latency: uniform ones, and those allocated for their latency."""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from benchmarks.pruning_equal import MIXED
from lpvit_edge.allocate import allocate
from lpvit_edge.errors import BudgetNotMetError
from lpvit_edge.layer_options import Option, layer_options
from lpvit_edge.network_cost import latency_ms
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form
from lpvit_edge.records import DeviceProfile, Sensitivity
from lpvit_edge.steps import forms as forms_of

# Where uniform pruning of the example's models begins to lose something, and beyond.
SPARSITIES = {
    "64x64": (0.6, 0.7, 0.8, 0.9),
    "32x32": (0.7, 0.8, 0.9),
    "64x16": (0.8, 0.9),
    "64x1": (0.9, 0.95),
}
AS_IT_IS = {**SPARSITIES, "64x64": (0.3, 0.4, 0.5, 0.6, 0.7), "32x32": (0.5, 0.7, 0.8, 0.9)}
_MARGIN = 0.03  # by which an allocation is predicted to be faster than the uniform network
_SAME = 0.04  # budgets of mixed allocations are no closer than this


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One network to be made."""

    plan: str  # uniform | allocated
    pattern: str  # one of SPARSITIES, or MIXED
    sparsity: float  # of uniform; allocated has the latency predicted for that
    forms: dict[str, Form]
    predicted_ms: float
    distortion: float  # predicted rise of the loss, all layers added up

    @property
    def name(self) -> str:
        """Also the file's."""
        return f"{self.plan}_{self.pattern}_{self.sparsity:g}"


def plans(
    profile: DeviceProfile,
    sensitivity: Sensitivity,
    sparsities: Mapping[str, Sequence[float]],
    *,
    mixed: bool,
) -> Iterator[Plan]:
    """Every network: uniform ones, by pattern, and those allocated for their predicted latency."""
    uniform = [
        _uniform(profile, sensitivity, pattern, sparsity)
        for pattern, of in sparsities.items()
        for sparsity in of
    ]
    for plan in uniform:
        yield plan
        yield from _allocated(profile, sensitivity, plan, (plan.pattern,), pattern=plan.pattern)
    last_ms = float("inf")
    for plan in sorted(uniform, key=lambda plan: -plan.predicted_ms):
        if mixed and plan.predicted_ms < (1.0 - _SAME) * last_ms:
            last_ms = plan.predicted_ms
            yield from _allocated(profile, sensitivity, plan, tuple(sparsities), pattern=MIXED)


def _uniform(
    profile: DeviceProfile, sensitivity: Sensitivity, pattern: str, sparsity: float
) -> Plan:
    """One form for every layer that it makes faster."""
    options = layer_options(profile, sensitivity, criterion="hessian", patterns=(pattern,))
    chosen = [next((o for o in opts if o.sparsity == sparsity), opts[0]) for opts in options]
    form = Form(pattern=parse_pattern(pattern), sparsity=sparsity)
    layers = zip(profile.layers, chosen, strict=True)
    return Plan(
        plan="uniform",
        pattern=pattern,
        sparsity=sparsity,
        forms={layer.name: form for layer, option in layers if option.sparsity},
        predicted_ms=latency_ms(profile, chosen),
        distortion=_sum(chosen),
    )


def _sum(chosen: Sequence[Option]) -> float:
    return sum(option.distortion for option in chosen)


def _allocated(
    profile: DeviceProfile,
    sensitivity: Sensitivity,
    uniform: Plan,
    patterns: tuple[str, ...],
    *,
    pattern: str,
) -> Iterator[Plan]:
    budget = {"latency_ms": (1.0 - _MARGIN) * uniform.predicted_ms}
    try:
        found = allocate(profile, sensitivity, budget=budget, patterns=patterns)
    except BudgetNotMetError as refused:
        print(f"{pattern} at the latency of {uniform.name}: {refused}", flush=True)
        return
    yield Plan(
        plan="allocated",
        pattern=pattern,
        sparsity=uniform.sparsity if pattern != MIXED else uniform.predicted_ms,
        forms=forms_of(found),
        predicted_ms=found.predicted_latency_ms,
        distortion=found.distortion,
    )
