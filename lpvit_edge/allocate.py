"""Spread sparsity over the layers: one pattern and sparsity for each, within a budget.

A multiple-choice knapsack: minimize the summed distortion so that predicted latency, energy per
image, mean power, MACs and weight bytes, as many of them as are limited, stay within the budget.
lpvit_edge.knapsack has the three ways to choose. A form that is not faster than dense on this
device is no option.
"""

from collections.abc import Mapping

from lpvit_edge.energy import covers_work, working_part
from lpvit_edge.errors import MeasurementError, MismatchError
from lpvit_edge.knapsack import ALLOCATORS, Constraints, distortion
from lpvit_edge.layer_options import Option, Options, Picks, layer_options
from lpvit_edge.network_cost import constraints, latency_ms, total
from lpvit_edge.records import Allocation, Choice, DeviceProfile, Sensitivity
from lpvit_edge.unreachable import refuse_unreachable

_OF_ENERGY = frozenset({"energy_mj", "power_mw"})


def allocate(
    profile: DeviceProfile,
    sensitivity: Sensitivity,
    *,
    budget: Mapping[str, float],
    allocator: str = "milp",
    criterion: str = "hessian",
    patterns: tuple[str, ...] | None = None,
    allow_estimated: bool = False,
) -> Allocation:
    """Choose a form for every layer.

    `budget` maps keys of lpvit_edge.budget.QUANTITIES to limits in the key's unit. Raises
    BudgetNotMetError, naming the constraint and the best that is reachable of each;
    MeasurementError for a limit of energy or power where the profile measured none, unless
    `allow_estimated` and it holds estimates.
    """
    refuse_mismatch(profile, sensitivity)
    options = layer_options(profile, sensitivity, criterion=criterion, patterns=patterns)
    if _OF_ENERGY & set(budget):
        refuse_unmeasured_energy(profile, options, allow_estimated=allow_estimated)
        options = tuple(tuple(o for o in opts if o.energy_mj is not None) for opts in options)
    built = constraints(profile, options, budget)
    refuse_unreachable(profile, options, built, budget)
    picks = ALLOCATORS[allocator](options, built)
    chosen = [opts[pick] for opts, pick in zip(options, picks, strict=True)]
    dense = [opts[0] for opts in options]
    return Allocation(
        model=profile.model,
        fingerprint=profile.fingerprint,
        allocator=allocator,
        criterion=criterion,
        budget=dict(budget),
        choices=tuple(_choice(*each) for each in zip(_names(profile), chosen, dense, strict=True)),
        predicted_latency_ms=latency_ms(profile, chosen),
        predicted_dense_ms=latency_ms(profile, dense),
        predicted_energy_mj=total(profile, "energy_mj", chosen),
        predicted_power_mw=total(profile, "power_mw", chosen),
        energy_quality=profile.power.quality,
        macs=sum(option.macs for option in chosen),
        dense_macs=sum(option.macs for option in dense),
        predicted_weight_bytes=total(profile, "weight_bytes", chosen),
        distortion=distortion(options, picks),
        bound=binding(allocator, options, built, picks),
        basis_sha256=sensitivity.basis_sha256,
    )


def _names(profile: DeviceProfile) -> tuple[str, ...]:
    return tuple(layer.name for layer in profile.layers)


def _choice(layer: str, chosen: Option, dense: Option) -> Choice:
    return Choice(
        layer=layer,
        pattern=chosen.pattern,
        sparsity=chosen.sparsity,
        latency_ms=chosen.latency_ms,
        dense_latency_ms=dense.latency_ms,
        distortion=chosen.distortion,
    )


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


def refuse_unmeasured_energy(
    profile: DeviceProfile, options: Options, *, allow_estimated: bool
) -> None:
    """Raise MeasurementError, saying what is missing, when energies cannot be limited."""
    power = profile.power
    silent = sum(opts[0].energy_mj is None for opts in options)
    if power.quality == "estimated" and not allow_estimated:
        raise MeasurementError(
            "the profile's energies are estimated from a TDP, not measured; measure on a machine "
            "with a power sensor, or pass --allow-estimated-energy to allocate by the estimate"
        )
    if power.quality in ("suspect", "unavailable"):
        raise MeasurementError(
            f"energy and power cannot be limited: the profile's energies are {power.quality} "
            f"({power.reason or 'no reason was noted'}). `lpvit doctor` says what this machine can "
            "measure; limit --target-latency instead"
        )
    if not covers_work(power.scope, profile.engine):  # as earlier versions measured it
        part = (working_part(profile.engine) or "").upper()
        raise MeasurementError(
            "energy and power cannot be limited: the profile's energies are those of "
            f"{power.scope} ({power.source}), which does not cover the {part}, where "
            f"{profile.engine} works; measure again with `lpvit profile`, or limit "
            "--target-latency instead"
        )
    if silent or profile.rest_energy_mj is None:
        what = f"{silent} dense layers" if silent else "the rest of the network"
        raise MeasurementError(
            f"energy and power cannot be limited: the profile has no energy of {what}; measure "
            "again with `lpvit profile`, with more time (--budget)"
        )


def binding(allocator: str, options: Options, built: Constraints, picks: Picks) -> tuple[str, ...]:
    """The constraints that force this distortion, by name.

    A constraint binds when the distortion would be lower without it, or when it alone already
    forces as much: of two that each suffice, both bind.
    """
    forced = distortion(options, picks)

    def is_lower_with(fewer: Constraints) -> bool:
        return distortion(options, ALLOCATORS[allocator](options, fewer)) < forced * (1 - 1e-6)

    return tuple(
        one.name
        for one in built
        if forced > 0.0
        and (is_lower_with([c for c in built if c is not one]) or not is_lower_with([one]))
    )
