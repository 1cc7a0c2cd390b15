"""The forms that each layer may take on this device, with what each costs and distorts."""

import math
from collections.abc import Callable, Iterator, Mapping

import msgspec
import numpy as np

from lpvit_edge.pattern import parse_pattern
from lpvit_edge.records import DeviceProfile, GemmCost, LayerShape, Sensitivity, SensitivityCurve

SPARSITIES = tuple(round(0.05 * step, 2) for step in range(1, 20))
_WEIGHT, _INDEX = 4, 4  # bytes of a float32 and of an int32


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One form of one layer: what it costs as predicted, per image, and what it distorts."""

    pattern: str
    sparsity: float
    latency_ms: float
    energy_mj: float | None  # None where it was not measured
    macs: float
    weight_bytes: float
    distortion: float


Options = tuple[tuple[Option, ...], ...]  # per layer, the dense form first
Picks = tuple[int, ...]  # per layer, the index of the chosen option


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


def costs_in_network(profile: DeviceProfile) -> tuple[GemmCost, ...]:
    """The forms as they cost inside a network: measured alone, times their pattern's factor.

    Energy as well as latency, for a layer draws the same power for the longer or shorter time.
    """
    return tuple(
        msgspec.structs.replace(
            gemm,
            latency_ms=gemm.latency_ms * factor,
            energy_mj=None if gemm.energy_mj is None else gemm.energy_mj * factor,
        )
        for gemm in profile.gemms
        for factor in (profile.factors.get(gemm.pattern, 1.0),)
    )


def _costs(profile: DeviceProfile) -> dict[_Key, dict[str, list[GemmCost]]]:
    costs: dict[_Key, dict[str, list[GemmCost]]] = {}
    for gemm in costs_in_network(profile):
        costs.setdefault(_key(gemm), {}).setdefault(gemm.pattern, []).append(gemm)
    return costs


def _options(
    layer: LayerShape,
    costs: Mapping[_Key, Mapping[str, list[GemmCost]]],
    curves: Mapping[tuple[str, str], SensitivityCurve],
    patterns: tuple[str, ...] | None,
) -> Iterator[Option]:
    measured = costs[_key(layer)]
    dense = measured["dense"][0]
    yield Option(
        pattern="dense",
        sparsity=0.0,
        latency_ms=dense.latency_ms,
        energy_mj=dense.energy_mj,
        macs=macs(layer, 0.0),
        weight_bytes=weight_bytes(layer, "dense", 0.0),
        distortion=0.0,
    )
    for pattern, gemms in measured.items():
        curve = curves.get((layer.name, pattern))
        if curve is None or (patterns is not None and pattern not in patterns):
            continue
        latency_at, energy_at = interpolated_latency(gemms), _interpolated_energy(gemms)
        for sparsity in SPARSITIES:
            latency_ms = latency_at(sparsity)
            if latency_ms < dense.latency_ms and sparsity <= curve.sparsity[-1]:
                yield Option(
                    pattern=pattern,
                    sparsity=sparsity,
                    latency_ms=latency_ms,
                    energy_mj=energy_at(sparsity),
                    macs=macs(layer, sparsity),
                    weight_bytes=weight_bytes(layer, pattern, sparsity),
                    distortion=float(np.interp(sparsity, curve.sparsity, curve.distortion)),
                )


def macs(layer: LayerShape, sparsity: float) -> float:
    """Multiply-accumulates per image."""
    return layer.tokens * layer.in_features * layer.out_features * (1.0 - sparsity)


def weight_bytes(layer: LayerShape, pattern: str, sparsity: float) -> float:
    """Bytes of the weight in model.onnx, float32, the indices of a block-sparse one included.

    2:4 keeps its zeros in place; biases, which no form changes, are not counted.
    """
    form = parse_pattern(pattern)
    dense = layer.in_features * layer.out_features
    if form.kind != "block":
        return _WEIGHT * dense
    blocks = round((1.0 - sparsity) * dense / (form.rows * form.cols))
    rows = layer.out_features // form.rows + 1
    return blocks * (_WEIGHT * form.rows * form.cols + _INDEX) + _INDEX * rows


def interpolated_latency(gemms: list[GemmCost]) -> Callable[[float], float]:
    """Latency over sparsity between the measured points, made to fall (more zeros, less work).

    Below the lowest measured sparsity it is infinite, so that nothing unmeasured is chosen.
    """
    ordered = sorted(gemms, key=lambda gemm: gemm.sparsity)
    sparsity = [gemm.sparsity for gemm in ordered]
    falling = never_rising([gemm.latency_ms for gemm in ordered])
    return lambda s: float(np.interp(s, sparsity, falling)) if s >= sparsity[0] else np.inf


def _interpolated_energy(gemms: list[GemmCost]) -> Callable[[float], float | None]:
    """Energy over sparsity in the same way, between the points that have one; None outside them.

    A form without any block left, which draws no more than no layer at all, has 0 mJ.
    """
    known = sorted((gemm.sparsity, gemm.energy_mj) for gemm in gemms if gemm.energy_mj is not None)
    if not known:
        return lambda _: None
    sparsity, falling = [s for s, _ in known], never_rising([energy for _, energy in known])
    return lambda s: (
        float(np.interp(s, sparsity, falling)) if sparsity[0] <= s <= sparsity[-1] else None
    )


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
