"""Whole networks on this device, and what they say about layers that were timed alone.

Timed in alternation, so that drift of the machine touches all of them alike:

    dense      as exported
    emptied    every prunable layer without a block: the rest of the network
    64x1, ...  every layer in this one pattern, each at a sparsity drawn from the measured ones
    mixed      every layer in a pattern and at a sparsity drawn at random, some dense

A layer inside a network meets other caches than alone. For the dense network, and for that of each
pattern, k is what its layers took over what they took alone; predictions multiply by it. The mixed
network takes no part in that: how far its prediction lies from its latency is in the profile.
"""

import contextlib
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge import profile as profiling
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prediction import PatternAt, layer_latency, measured_sparsities
from lpvit_edge.progress import track
from lpvit_edge.records import GemmCost, LayerShape
from lpvit_edge.steps import export_model

if TYPE_CHECKING:
    from lpvit_edge.job import Job
    from lpvit_profilers.base import SourceInfo
    from lpvit_profilers.latency import LatencyMeasurement
    from lpvit_profilers.sampler import Sampler

Forms = dict[str, PatternAt]
MIXED_DENSE_SHARE = 0.2
_SEED = 0


class Networks(msgspec.Struct, frozen=True, kw_only=True):
    """What the whole networks said."""

    dense: "LatencyMeasurement"
    rest_ms: float
    factors: dict[str, float]
    mixed_error: float | None  # predicted over measured, less 1; None without any sparse form
    rest_energy_mj: float | None
    energy_sum: float | None = None  # (rest + dense layers) / dense, in energy; None if unknown


def measure_networks(
    job: "Job",
    dense_onnx: Path,
    gemms: tuple[GemmCost, ...],
    *,
    seconds: float,
    sensor: "tuple[Sampler, SourceInfo] | None" = None,
) -> Networks:
    """Export, load and time them, each for `seconds`."""
    layers = job.walk.layers
    networks = {
        "emptied": emptied_forms(layers, job.patterns),
        **{pattern: pattern_forms(layers, gemms, pattern) for pattern in _patterns(gemms)},
    }
    mixed = mixed_forms(layers, gemms, random.Random(_SEED))
    if mixed:
        networks["mixed"] = mixed
    with tempfile.TemporaryDirectory() as scratch:
        paths = {"dense": dense_onnx}
        for name, forms in track(
            networks.items(), what="profile: export networks", total=len(networks)
        ):
            paths[name] = Path(scratch) / f"{len(paths)}.onnx"
            export_forms(job, forms, paths[name])
        timed, energy_mj = _timed(job, paths, seconds=seconds, sensor=sensor)
    latency_ms = {name: found.median_ms for name, found in timed.items()}
    rest = profiling.rest_ms(latency_ms["emptied"], layers, gemms, _named(networks["emptied"]))
    factors = fitted_factors(latency_ms, networks, layers, gemms, rest_ms=rest)
    rest_mj = rest_energy_mj(energy_mj.get("emptied"), layers, gemms, _named(networks["emptied"]))
    return Networks(
        dense=timed["dense"],
        rest_ms=rest,
        factors=factors,
        mixed_error=_error(latency_ms, mixed, layers, gemms, factors, rest_ms=rest),
        rest_energy_mj=rest_mj,
        energy_sum=energy_sum(
            energy_mj.get("dense"), rest_mj, layers, gemms, factor=factors.get("dense", 1.0)
        ),
    )


def emptied_forms(layers: tuple[LayerShape, ...], patterns: tuple[str, ...]) -> Forms:
    """Every layer that a block pattern divides, with no block left in the first that does."""
    blocks = [name for name in patterns if parse_pattern(name).kind == "block"]
    forms: Forms = {}
    for layer in layers:
        shape = layer.out_features, layer.in_features
        fitting = [name for name in blocks if parse_pattern(name).fits(*shape)]
        if fitting:
            forms[layer.name] = (fitting[0], 1.0)
    return forms


def pattern_forms(
    layers: tuple[LayerShape, ...], gemms: tuple[GemmCost, ...], pattern: str
) -> Forms:
    """Every layer that was timed in the pattern, at one of its measured sparsities."""
    generator = random.Random(_SEED)
    forms: Forms = {}
    for layer in layers:
        sparsities = measured_sparsities(gemms, layer).get(pattern)
        if sparsities:
            forms[layer.name] = (pattern, generator.choice(sparsities))
    return forms


def mixed_forms(
    layers: tuple[LayerShape, ...], gemms: tuple[GemmCost, ...], generator: random.Random
) -> Forms:
    """Patterns and sparsities at random, also between the measured ones; one in five dense."""
    forms: Forms = {}
    for layer in layers:
        choices = measured_sparsities(gemms, layer)
        if choices and generator.random() >= MIXED_DENSE_SHARE:
            pattern = generator.choice(sorted(choices))
            low, high = min(choices[pattern]), max(choices[pattern])
            steps = round((high - low) / 0.05)
            forms[layer.name] = (pattern, round(low + 0.05 * generator.randint(0, steps), 2))
    return forms


def export_forms(job: "Job", forms: Mapping[str, PatternAt], path: Path) -> None:
    """Write the job's model with its smallest blocks removed as the forms say."""
    from lpvit_edge.prune import Form
    from lpvit_edge.trial import masked_by_magnitude

    wanted = {
        name: Form(pattern=parse_pattern(pattern), sparsity=sparsity)
        for name, (pattern, sparsity) in forms.items()
    }
    masked = masked_by_magnitude(job.model.module, wanted)
    export_model(job, masked, {name: form.pattern for name, form in wanted.items()}, path)


def fitted_factors(
    latency_ms: Mapping[str, float],
    networks: Mapping[str, Forms],
    layers: tuple[LayerShape, ...],
    gemms: tuple[GemmCost, ...],
    *,
    rest_ms: float,
) -> dict[str, float]:
    """k of "dense" and of each pattern that has a network of its own.

    Layers that a pattern does not divide stay dense in its network, and count as such. A pattern
    whose layers drowned in the scatter has no factor, which means 1.
    """
    alone = layer_latency(gemms)
    dense_alone = sum(alone(layer, "dense", 0.0) for layer in layers)
    factors: dict[str, float] = {}
    if dense_alone > 0.0 and latency_ms["dense"] > rest_ms:
        factors["dense"] = (latency_ms["dense"] - rest_ms) / dense_alone
    for pattern in networks.keys() - {"emptied", "mixed"}:
        forms = networks[pattern]
        left = sum(alone(layer, "dense", 0.0) for layer in layers if layer.name not in forms)
        own = sum(alone(layer, *forms[layer.name]) for layer in layers if layer.name in forms)
        inside = latency_ms[pattern] - rest_ms - factors.get("dense", 1.0) * left
        if own > 0.0 and inside > 0.0:
            factors[pattern] = inside / own
    return dict(sorted(factors.items()))


def rest_energy_mj(
    emptied_mj: float | None,
    layers: tuple[LayerShape, ...],
    gemms: tuple[GemmCost, ...],
    emptied_as: Mapping[str, str],
) -> float | None:
    """Gross energy of the network without its prunable layers; None where a part is unknown."""
    known = {(g.pattern, g.sparsity, _shape(g)): g.energy_mj for g in gemms}
    forms = {
        layer: (emptied_as.get(layer.name, "dense"), float(layer.name in emptied_as))
        for layer in layers
    }
    alone = [known.get((*form, _shape(layer))) for layer, form in forms.items()]
    parts = [energy for energy in alone if energy is not None]
    if emptied_mj is None or len(parts) < len(alone):
        return None
    return max(0.0, emptied_mj - sum(parts))


def energy_sum(
    dense_mj: float | None,
    rest_mj: float | None,
    layers: tuple[LayerShape, ...],
    gemms: tuple[GemmCost, ...],
    *,
    factor: float = 1.0,
) -> float | None:
    """Energy of the rest and of all dense layers over that of the whole dense network.

    The layers count times `factor`, that of their latency: it tests that they take as much more
    energy in the network as they take more time.
    """
    known = {_shape(g): g.energy_mj for g in gemms if g.pattern == "dense"}
    alone = [known[_shape(layer)] for layer in layers]
    parts = [part for part in alone if part is not None]
    if not dense_mj or rest_mj is None or len(parts) < len(alone):
        return None
    return (rest_mj + factor * sum(parts)) / dense_mj


def _shape(part: LayerShape | GemmCost) -> tuple[int, int, int, str]:
    return part.tokens, part.in_features, part.out_features, part.activation


def _patterns(gemms: tuple[GemmCost, ...]) -> tuple[str, ...]:
    """Patterns in which some layer below sparsity 1 was timed."""
    found = (g.pattern for g in gemms if g.pattern != "dense" and g.sparsity < 1.0)
    return tuple(dict.fromkeys(found))


def _named(forms: Forms) -> dict[str, str]:
    return {name: pattern for name, (pattern, _) in forms.items()}


def _timed(
    job: "Job",
    paths: Mapping[str, Path],
    *,
    seconds: float,
    sensor: "tuple[Sampler, SourceInfo] | None",
) -> "tuple[dict[str, LatencyMeasurement], dict[str, float | None]]":
    """All networks in alternation; with a sensor the energy of a call, dense and emptied."""
    from lpvit_edge.progress import working
    from lpvit_engines import load_engine
    from lpvit_profilers.latency import measure_alternating

    with contextlib.ExitStack() as stack, working("profile: whole networks"):
        runs = {
            name: profiling.call(
                stack.enter_context(load_engine(job.engine, path, threads=job.threads))
            )
            for name, path in paths.items()
        }
        timed = measure_alternating(runs, min_time_s=seconds)
        energy_mj = {
            name: profiling.call_energy_mj(runs[name], *sensor)
            for name in ("dense", "emptied")
            if sensor is not None
        }
    return timed, energy_mj


def _error(
    latency_ms: Mapping[str, float],
    mixed: Forms,
    layers: tuple[LayerShape, ...],
    gemms: tuple[GemmCost, ...],
    factors: Mapping[str, float],
    *,
    rest_ms: float,
) -> float | None:
    if not mixed:
        return None
    alone = layer_latency(gemms)
    forms = [(layer, mixed.get(layer.name, ("dense", 0.0))) for layer in layers]
    predicted = rest_ms + sum(factors.get(f[0], 1.0) * alone(layer, *f) for layer, f in forms)
    return predicted / latency_ms["mixed"] - 1.0
