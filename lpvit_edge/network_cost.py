"""What a whole network costs in latency, energy, power, MACs and bytes with chosen forms.

The one place that adds up: predictions, limits and shares of the dense network all come from here.
"""

from collections.abc import Mapping, Sequence

from lpvit_edge.errors import MeasurementError
from lpvit_edge.knapsack import Constraint
from lpvit_edge.layer_options import Option, Options, layer_options
from lpvit_edge.records import DeviceProfile, Sensitivity


def rest(profile: DeviceProfile, key: str) -> float | None:
    """What the network costs beside its prunable layers; None where it was not measured."""
    return {
        "latency_ms": profile.rest_ms,
        "energy_mj": profile.rest_energy_mj,
        "macs": 0.0,  # MACs are counted of the prunable layers only
        "weight_bytes": profile.rest_weight_bytes,
    }[key]


def total(profile: DeviceProfile, key: str, chosen: Sequence[Option]) -> float | None:
    """The network's cost with one option per layer; None where a part was not measured.

    `key` is one of lpvit_edge.budget.QUANTITIES. Mean power is that of a network that runs
    without pause, energy over latency.
    """
    if key == "power_mw":
        energy_mj = total(profile, "energy_mj", chosen)
        return None if energy_mj is None else 1000.0 * energy_mj / latency_ms(profile, chosen)
    parts = [rest(profile, key), *(getattr(option, key) for option in chosen)]
    known = [part for part in parts if part is not None]
    return float(sum(known)) if len(known) == len(parts) else None


def latency_ms(profile: DeviceProfile, chosen: Sequence[Option]) -> float:
    """The predicted latency of the network with one option per layer."""
    return profile.rest_ms + sum(option.latency_ms for option in chosen)


def dense_totals(profile: DeviceProfile) -> dict[str, float | None]:
    """What the dense network costs: latency as measured end to end, the others summed."""
    no_curves = Sensitivity(model=profile.model, images=0, images_sha256="", curves=())
    dense = [opts[0] for opts in layer_options(profile, no_curves, criterion="hessian")]
    keys = ("energy_mj", "power_mw", "macs", "weight_bytes")
    return {"latency_ms": profile.dense.median_ms, **{k: total(profile, k, dense) for k in keys}}


def constraints(
    profile: DeviceProfile, options: Options, budget: Mapping[str, float]
) -> tuple[Constraint, ...]:
    """The budget as sums over the layers, what the rest of the network costs taken off.

    Energies must be known. Raises MeasurementError where the profile does not say what the rest
    of the network needs.
    """
    return tuple(_constraint(profile, options, key, limit) for key, limit in budget.items())


def _constraint(profile: DeviceProfile, options: Options, key: str, limit: float) -> Constraint:
    beside = rest(profile, "energy_mj" if key == "power_mw" else key)
    if beside is None:
        raise MeasurementError(
            f"{key} cannot be limited: the profile does not say what the rest of the network "
            "needs; measure again with `lpvit profile`"
        )
    if key == "power_mw":
        # Mean power in mW is 1000 mJ / ms, so that E - P t <= 0 is linear in the choices.
        watts = limit / 1000.0
        costs = tuple(tuple(exceeding(o, watts) for o in opts) for opts in options)
        return Constraint(name=key, costs=costs, limit=watts * profile.rest_ms - beside)
    costs = tuple(tuple(float(getattr(option, key)) for option in opts) for opts in options)
    return Constraint(name=key, costs=costs, limit=limit - beside)


def exceeding(option: Option, watts: float) -> float:
    """Energy (mJ) of a layer beyond what it would need at this power; negative below it."""
    assert option.energy_mj is not None, "energies are checked before they are limited"
    return option.energy_mj - watts * option.latency_ms
