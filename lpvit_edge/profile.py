"""Measure what each form of each layer costs on this device, through the engine itself.

A layer is far shorter than one engine call, so it is timed inside a small network of several
copies, each with weights of its own (a real network never finds its weights in the cache either),
and the time of a network without layers is taken off:

    latency = (t(COPIES layers) - t(0 layers)) / COPIES

The rest of the network (attention, norms, patch embedding, head) is the whole network with every
prunable layer emptied to zero blocks, less what the empty layers cost alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge import onnx_nodes
from lpvit_edge.deps import require
from lpvit_edge.files import write_atomic
from lpvit_edge.pattern import Pattern, parse_pattern
from lpvit_edge.progress import track
from lpvit_edge.records import GemmCost, LayerShape

if TYPE_CHECKING:
    from lpvit_engines import Engine
    from lpvit_profilers.latency import LatencyMeasurement

COPIES = 4
# What an ordinary processor is asked first: one input column by 64 output rows runs as fast there
# as 64 by 64 and costs almost no accuracy. A GPU needs its own menu.
CPU_PATTERNS = ("64x1", "64x16", "32x32")
SPARSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)


class _Form(msgspec.Struct, frozen=True, kw_only=True):
    shape: LayerShape
    pattern: str
    sparsity: float


def profile_gemms(
    layers: tuple[LayerShape, ...],
    *,
    engine: str,
    threads: int,
    scratch: Path,
    patterns: tuple[str, ...] = CPU_PATTERNS,
    sparsities: tuple[float, ...] = SPARSITIES,
    seconds_each: float = 0.2,
    rounds: int = 2,
) -> tuple[GemmCost, ...]:
    """Time every distinct layer, dense and in every pattern that divides it.

    `rounds` passes over all forms, whose samples are put together, so that a passing disturbance
    does not decide between two forms. Scratch networks are written to `scratch`.
    """
    forms = _distinct_forms(layers, patterns, sparsities)
    timed: dict[_Form, list[float]] = {form: [] for form in forms}
    stable: dict[_Form, bool] = dict.fromkeys(forms, True)
    jobs = [form for _ in range(rounds) for form in forms]
    for form in track(jobs, what="profile: layer forms", total=len(jobs)):
        base = _time(_network(form, copies=0), engine, threads, scratch, seconds_each / 4)
        full = _time(_network(form, copies=COPIES), engine, threads, scratch, seconds_each)
        timed[form] += [(sample - base.median_ms) / COPIES for sample in full.samples_ms]
        stable[form] &= full.stable
    return tuple(_cost(form, timed[form], stable=stable[form]) for form in forms)


def _distinct_forms(
    layers: tuple[LayerShape, ...], patterns: tuple[str, ...], sparsities: tuple[float, ...]
) -> list[_Form]:
    unnamed = {msgspec.structs.replace(layer, name="") for layer in layers}
    shapes = sorted(unnamed, key=lambda s: -s.tokens * s.in_features * s.out_features)
    return [form for shape in shapes for form in _forms(shape, patterns, sparsities)]


def _forms(
    shape: LayerShape, patterns: tuple[str, ...], sparsities: tuple[float, ...]
) -> Iterator[_Form]:
    yield _Form(shape=shape, pattern="dense", sparsity=0.0)
    for pattern in patterns:
        if parse_pattern(pattern).fits(shape.out_features, shape.in_features):
            for sparsity in sparsities:
                yield _Form(shape=shape, pattern=pattern, sparsity=sparsity)


def _network(form: _Form, *, copies: int) -> bytes:
    shape = form.shape
    generator = np.random.default_rng(0)
    weights = [_random_weight(form, generator) for _ in range(copies)]
    model = onnx_nodes.repeated_layer_model(
        tokens=shape.tokens,
        in_features=shape.in_features,
        out_features=shape.out_features,
        activation=shape.activation,
        copies=weights,
    )
    content: bytes = model.SerializeToString()
    return content


def _random_weight(form: _Form, generator: np.random.Generator) -> "onnx_nodes.Weight":
    from lpvit_engines.block_sparse import BlockSparseMatrix

    shape = form.shape
    size = (shape.out_features, shape.in_features)
    weight = generator.standard_normal(size, np.float32) / np.float32(shape.in_features**0.5)
    if form.pattern == "dense":
        return weight
    pattern = parse_pattern(form.pattern)
    weight *= _random_mask(pattern, size, form.sparsity, generator)
    return BlockSparseMatrix.from_dense(weight, block_rows=pattern.rows, block_cols=pattern.cols)


def _random_mask(
    pattern: Pattern, size: tuple[int, int], sparsity: float, generator: np.random.Generator
) -> "np.ndarray[tuple[int, int], np.dtype[np.bool_]]":
    grid = (size[0] // pattern.rows, size[1] // pattern.cols)
    keep = np.ones(grid[0] * grid[1], np.bool_)
    dropped = round(sparsity * len(keep))
    keep[generator.permutation(len(keep))[:dropped]] = False
    return keep.reshape(grid).repeat(pattern.rows, 0).repeat(pattern.cols, 1)


def _time(
    content: bytes, engine: str, threads: int, scratch: Path, seconds: float
) -> "LatencyMeasurement":
    from lpvit_engines import load_engine
    from lpvit_profilers.latency import measure_latency

    path = scratch / "layer.onnx"
    write_atomic(path, content)
    with load_engine(engine, path, threads=threads) as loaded:
        x = _random_input(loaded)
        return measure_latency(lambda: loaded.infer(x), min_time_s=seconds)


def _random_input(engine: "Engine") -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return np.random.default_rng(1).standard_normal(engine.input_shape, np.float32)


def _cost(form: _Form, samples_ms: list[float], *, stable: bool) -> GemmCost:
    median = float(np.median(samples_ms))
    return GemmCost(
        tokens=form.shape.tokens,
        in_features=form.shape.in_features,
        out_features=form.shape.out_features,
        activation=form.shape.activation,
        pattern=form.pattern,
        sparsity=form.sparsity,
        latency_ms=max(median, 0.0),
        spread_ms=float(np.median(np.abs(np.asarray(samples_ms) - median))),
        stable=stable,
    )


def profile_networks(
    dense: Path, other: Path, *, engine: str, threads: int, seconds: float
) -> "dict[str, LatencyMeasurement]":
    """Latency of two networks in alternation: "dense" and "other"."""
    from lpvit_engines import load_engine
    from lpvit_profilers.latency import measure_alternating

    with (
        load_engine(engine, dense, threads=threads) as full,
        load_engine(engine, other, threads=threads) as second,
    ):
        x = _random_input(full)
        return measure_alternating(
            {"dense": lambda: full.infer(x), "other": lambda: second.infer(x)},
            min_time_s=seconds,
        )


def rest_ms(
    emptied_ms: float,
    layers: tuple[LayerShape, ...],
    gemms: tuple[GemmCost, ...],
    emptied_as: Mapping[str, str],
) -> float:
    """The network without its prunable layers: emptied, less what the empty layers cost alone.

    `emptied_as` names the pattern in which each layer was emptied; the others stayed dense.
    """
    cost = _cost_table(gemms)
    alone = sum(
        cost[_shape_key(layer), emptied_as[layer.name], 1.0]
        if layer.name in emptied_as
        else cost[_shape_key(layer), "dense", 0.0]
        for layer in layers
    )
    return max(0.0, emptied_ms - alone)


def dense_layers_ms(layers: tuple[LayerShape, ...], gemms: tuple[GemmCost, ...]) -> float:
    """All prunable layers in dense form, each timed alone."""
    cost = _cost_table(gemms)
    return sum(cost[_shape_key(layer), "dense", 0.0] for layer in layers)


_ShapeKey = tuple[int, int, int, str]


def _shape_key(part: LayerShape | GemmCost) -> _ShapeKey:
    return part.tokens, part.in_features, part.out_features, part.activation


def _cost_table(gemms: tuple[GemmCost, ...]) -> dict[tuple[_ShapeKey, str, float], float]:
    return {(_shape_key(g), g.pattern, g.sparsity): g.latency_ms for g in gemms}


def engine_version(engine: str) -> str:
    """Version of the library behind an engine, or "builtin"."""
    return str(require("openvino").get_version()) if engine == "openvino" else "builtin"
