"""What a network is predicted to take: the rest and the layers, as they cost inside a network.

    latency = rest + sum over layers of k[pattern] * (the layer timed alone)

The factors k are measured on whole networks, see lpvit_edge.whole_networks, and are in the profile.
"""

from collections.abc import Callable, Mapping

from lpvit_edge.layer_options import costs_in_network, interpolated_latency
from lpvit_edge.records import DeviceProfile, GemmCost, LayerShape

# (pattern, sparsity) of a layer; "dense" has sparsity 0.
PatternAt = tuple[str, float]
LatencyOf = Callable[[LayerShape, str, float], float]


def predicted_ms(profile: DeviceProfile, forms: Mapping[str, PatternAt]) -> float:
    """Latency of the network with these layers in these forms and all others dense.

    Infinite where a form lies below the lowest sparsity that was measured.
    """
    latency_of = layer_latency(costs_in_network(profile))
    return profile.rest_ms + sum(
        latency_of(layer, *forms.get(layer.name, ("dense", 0.0))) for layer in profile.layers
    )


def layer_latency(gemms: tuple[GemmCost, ...]) -> LatencyOf:
    """Latency of a layer by its shape, pattern and sparsity, between the measured sparsities."""
    measured: dict[tuple[int, int, int, str, str], list[GemmCost]] = {}
    for gemm in gemms:
        measured.setdefault((*_shape(gemm), gemm.pattern), []).append(gemm)
    curves = {key: interpolated_latency(found) for key, found in measured.items()}
    return lambda layer, pattern, sparsity: curves[(*_shape(layer), pattern)](sparsity)


def measured_sparsities(
    gemms: tuple[GemmCost, ...], layer: LayerShape
) -> dict[str, tuple[float, ...]]:
    """The block patterns in which a layer was timed, each with its sparsities below 1."""
    found: dict[str, tuple[float, ...]] = {}
    for gemm in gemms:
        if _shape(gemm) == _shape(layer) and gemm.pattern != "dense" and gemm.sparsity < 1.0:
            found[gemm.pattern] = (*found.get(gemm.pattern, ()), gemm.sparsity)
    return found


def _shape(part: LayerShape | GemmCost) -> tuple[int, int, int, str]:
    return part.tokens, part.in_features, part.out_features, part.activation
