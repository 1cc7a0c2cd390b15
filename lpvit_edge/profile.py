"""Measure what each form of each layer costs on this device, through the engine itself.

A layer is far shorter than one engine call, so it is timed inside a network of several copies,
each behind a normalization and with weights of its own (a real network does not find its input and
its weights where the layer before had them either), in alternation with a network that has the
normalizations and no layers, whose time is taken off:

    latency = (t(copies) - t(no layers)) / copies

The rest of the network (attention, norms, patch embedding, head) is the whole network with every
prunable layer emptied to zero blocks, less what the empty layers cost alone.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.files import write_atomic
from lpvit_edge.layer_networks import LayerForm, layer_forms, network
from lpvit_edge.progress import track
from lpvit_edge.records import GemmCost, LayerShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lpvit_engines import Engine
    from lpvit_profilers.base import SourceInfo
    from lpvit_profilers.latency import LatencyMeasurement
    from lpvit_profilers.sampler import Sampler

SPARSITIES = (0.2, 0.4, 0.6, 0.8, 1.0)
DEFAULT_SECONDS = 0.3  # for each form, when no budget says otherwise
_MIN_SECONDS, _MAX_SECONDS = 0.03, 2.0
ENERGY_WINDOW_S = 3.0
METHOD = "own inputs and weights"  # of timing a layer alone; costs of another are not taken over
# A cost is called stable when half of its samples lie this close to the median.
_STABLE_SHARE, _STABLE_MS = 0.1, 0.002


def profile_gemms(
    layers: tuple[LayerShape, ...],
    *,
    engine: str,
    threads: int,
    patterns: tuple[str, ...],
    sparsities: tuple[float, ...] = SPARSITIES,
    seconds: float | None = None,
    kept: tuple[GemmCost, ...] = (),
    keep: Callable[[tuple[GemmCost, ...]], None] | None = None,
    sensor: "tuple[Sampler, SourceInfo] | None" = None,
) -> tuple[GemmCost, ...]:
    """Time every distinct layer, dense and in every pattern that divides it.

    `seconds` bounds the whole: forms of layers with more work get more of it, and when it has
    passed, forms not yet timed are left out, so they are no option later (the dense forms and one
    empty form of each layer, which every prediction needs, never are). A form that is not stable
    is timed once more, and the steadier of the two counts; one whose time drowns in its scatter
    both times is left out.
    `kept` are costs from an interrupted run; `keep` is called with all costs after each form.
    With a running `sensor` each form's energy is measured too.
    """
    forms = layer_forms(layers, patterns, sparsities)
    required = _required(forms)
    forms = (*required, *(form for form in forms if form not in required))
    share = _shares(forms, seconds, windows_s=0.0 if sensor is None else 2 * ENERGY_WINDOW_S)
    known = {_form_key(cost): cost for cost in kept}
    deadline_s = time.monotonic() + (seconds if seconds is not None else float("inf"))
    costs: list[GemmCost] = []
    for form in track(forms, what="profile: layer forms", total=len(forms)):
        key = (_shape_key(form.shape), form.pattern, form.sparsity)
        late = time.monotonic() > deadline_s and form not in required
        if key in known:
            costs.append(known[key])
        elif not late:
            cost = measure_form(form, engine, threads, share[form], sensor)
            if not cost.stable:
                again = measure_form(form, engine, threads, 2 * share[form], sensor)
                cost = min(cost, again, key=_scatter)
            if form in required or is_measured(cost):
                costs.append(cost)
            if keep is not None:
                reached = {_form_key(cost) for cost in costs}
                keep((*costs, *(cost for cost in kept if _form_key(cost) not in reached)))
    return tuple(costs)


def is_measured(cost: GemmCost) -> bool:
    """Whether the time stands out of its own scatter; a form that does not is no option."""
    return cost.latency_ms > cost.spread_ms


def _scatter(cost: GemmCost) -> float:
    return cost.spread_ms / cost.latency_ms if cost.latency_ms > 0.0 else float("inf")


def _required(forms: tuple[LayerForm, ...]) -> tuple[LayerForm, ...]:
    """Dense forms, and each shape emptied in the first pattern that fits it."""
    dense = [form for form in forms if form.pattern == "dense"]
    empty = {form.shape: form for form in reversed(forms) if form.sparsity == 1.0}
    return (*dense, *(empty[form.shape] for form in dense if form.shape in empty))


def _shares(
    forms: tuple[LayerForm, ...], seconds: float | None, *, windows_s: float
) -> dict[LayerForm, float]:
    """Seconds of timing for each form, by the root of the work in its layers.

    What the windows of an energy measurement take of the budget (`windows_s` a form) is no time
    for timing.
    """
    if seconds is None:
        return dict.fromkeys(forms, DEFAULT_SECONDS)
    weights = {form: float(form.macs) ** 0.5 for form in forms}
    # Loading two networks for each form takes about as long as timing them for a short while.
    scale = 0.5 * max(0.0, seconds - windows_s * len(forms)) / sum(weights.values())
    return {f: min(_MAX_SECONDS, max(_MIN_SECONDS, scale * w)) for f, w in weights.items()}


def measure_form(
    form: LayerForm,
    engine: str,
    threads: int,
    seconds: float,
    sensor: "tuple[Sampler, SourceInfo] | None" = None,
) -> GemmCost:
    """Time one form; `seconds` are split between the network with layers and the one without."""
    from lpvit_engines import load_engine
    from lpvit_profilers.latency import measure_alternating

    with TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        runs: dict[str, Callable[[], object]] = {}
        for name in ("full", "base"):
            path = Path(scratch) / f"{name}.onnx"
            write_atomic(path, network(form, empty=name == "base"))
            loaded = stack.enter_context(load_engine(engine, path, threads=threads))
            runs[name] = call(loaded)
        timed = measure_alternating(runs, min_time_s=seconds / 2)
        energy = None if sensor is None else _energy_mj(runs, *sensor, form=form)
    return _cost(form, timed, energy_mj=energy)


def call(engine: "Engine") -> Callable[[], object]:
    """One call of an engine on noise."""
    x = random_input(engine)
    return lambda: engine.infer(x)


def random_input(engine: "Engine") -> "NDArray[np.float32]":
    """Noise of the engine's input shape."""
    return np.random.default_rng(1).standard_normal(engine.input_shape, np.float32)


def _energy_mj(
    runs: dict[str, Callable[[], object]],
    sampler: "Sampler",
    info: "SourceInfo",
    *,
    form: LayerForm,
) -> float | None:
    """Gross energy of one layer; None where the sensor failed or could not tell it from no layer.

    A layer without any block that cannot be told from none needs none.
    """
    full, base = (call_energy_mj(runs[name], sampler, info) for name in ("full", "base"))
    if full is None or base is None:
        return None
    if full <= base:
        return 0.0 if form.sparsity == 1.0 else None
    return (full - base) / form.copies


def call_energy_mj(
    run: Callable[[], object], sampler: "Sampler", info: "SourceInfo"
) -> float | None:
    """Gross energy of one call, looped for one window; None where the sensor could not tell.

    A window with a doubt (readings in step with the work or that never moved, a counter that stood
    still) tells nothing: there is one only, and no repeats to hold it against.
    """
    from lpvit_profilers.energy_window import measure_window

    window = measure_window(run, sampler, info, for_s=ENERGY_WINDOW_S)
    stuck = window.is_stuck and info.quality != "estimated"
    if window.energy_mj is None or window.reason or stuck or not window.calls:
        return None
    return window.energy_mj / window.calls


def _cost(
    form: LayerForm, timed: "Mapping[str, LatencyMeasurement]", *, energy_mj: float | None
) -> GemmCost:
    full, base = timed["full"], timed["base"]
    latency_ms = max(0.0, (full.median_ms - base.median_ms) / form.copies)
    spread_ms = (full.mad_ms + base.mad_ms) / form.copies
    return GemmCost(
        tokens=form.shape.tokens,
        in_features=form.shape.in_features,
        out_features=form.shape.out_features,
        activation=form.shape.activation,
        pattern=form.pattern,
        sparsity=form.sparsity,
        latency_ms=latency_ms,
        spread_ms=spread_ms,
        stable=spread_ms <= max(_STABLE_SHARE * latency_ms, _STABLE_MS),
        energy_mj=energy_mj,
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
        return measure_alternating({"dense": call(full), "other": call(second)}, min_time_s=seconds)


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


def rank_correlation(
    in_place: Mapping[str, float], layers: tuple[LayerShape, ...], gemms: tuple[GemmCost, ...]
) -> float | None:
    """Spearman's rho between layers timed alone and in place; None for fewer than three."""
    cost = _cost_table(gemms)
    pairs = [
        (cost[_shape_key(layer), "dense", 0.0], in_place[layer.name])
        for layer in layers
        if layer.name in in_place
    ]
    if len(pairs) < 3:
        return None
    alone, inside = zip(*pairs, strict=True)
    return float(require("scipy.stats").spearmanr(alone, inside).statistic)


_ShapeKey = tuple[int, int, int, str]


def _shape_key(part: LayerShape | GemmCost) -> _ShapeKey:
    return part.tokens, part.in_features, part.out_features, part.activation


def _form_key(cost: GemmCost) -> tuple[_ShapeKey, str, float]:
    return _shape_key(cost), cost.pattern, cost.sparsity


def _cost_table(gemms: tuple[GemmCost, ...]) -> dict[tuple[_ShapeKey, str, float], float]:
    return {_form_key(g): g.latency_ms for g in gemms}


def engine_version(engine: str) -> str:
    """Version of the library behind an engine, or "builtin"."""
    if engine == "tensorrt":
        return str(require("tensorrt").__version__)
    return str(require("openvino").get_version()) if engine == "openvino" else "builtin"
