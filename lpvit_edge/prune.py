"""Prune a model layer by layer, each repaired on what the already pruned prefix feeds it."""

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk
from lpvit_edge.pattern import DENSE, TWO_FOUR_SPARSITY, Pattern
from lpvit_edge.records import LayerShape, PrunedLayer
from lpvit_edge.repair import (
    Statistics,
    choose_mask,
    expand,
    normal_equations,
    relative_error,
    removal_costs,
    resolve,
    unmasked_solution,
)
from lpvit_edge.statistics import layer_inputs, layer_statistics, stage_input, with_bias

Scores = Mapping[str, Tensor]  # layer -> scores (N / rows, K / cols) of blocks, small ones go first


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """What one layer is to become."""

    pattern: Pattern = DENSE
    sparsity: float = 0.0  # 2:4 has one only, 0.5


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How blocks are chosen and what happens to the weights that remain.

    selection "obs" uses the removal costs of lpvit_edge.repair, "magnitude" the squared norm of a
    block, "scores" the scores handed in (LPViT's Taylor scores, say).
    """

    selection: Literal["obs", "magnitude", "scores"] = "obs"
    repair: bool = True
    damping: float = 0.01  # share of the Hessian's mean diagonal that is added to its diagonal
    steps: int = 32  # batches in which the elimination removes a layer's blocks
    batch: int = 32  # images per forward pass


def prune(
    model: nn.Module,
    walk: Walk,
    forms: Mapping[str, Form],
    images: Tensor,
    *,
    settings: Settings | None = None,
    scores: Scores | None = None,
) -> Iterator[tuple[PrunedLayer, nn.Module]]:
    """Prune layer after layer; each item is what happened to a layer, and the model so far.

    images (n, 3, S, S), normalized. A layer that `forms` leaves dense is re-solved without a mask
    once the prefix before it has changed. The given model stays as it is. Raises PruningError,
    naming the layer and the remedy.
    """
    settings = settings or Settings()
    _refuse_poor_calibration(walk.layers, images)
    _refuse_misfits(walk.layers, forms)
    pruned = copy.deepcopy(model)
    changed = False
    starts = range(0, len(images), settings.batch)
    batches = [images[start : start + settings.batch] for start in starts]
    first = walk.stages[0][0]
    dense_in = [stage_input(model, first, batch) for batch in batches] if first else batches
    pruned_in = dense_in
    for stage, names in walk.stages:
        dense_stage, pruned_stage = model.get_submodule(stage), pruned.get_submodule(stage)
        inputs = layer_inputs(dense_stage, _linears(model, names), dense_in)
        for name in names:
            form = forms.get(name, Form())
            if form.sparsity == 0.0 and not (changed and settings.repair):
                continue
            started = time.perf_counter()
            layer, dense_layer = (_linears(m, (name,))[name] for m in (pruned, model))
            with _naming(name):
                statistics = layer_statistics(
                    pruned_stage, layer, pruned_in, dense_layer, inputs[name]
                )
                V, mask, damping = _solve(layer, form, statistics, settings, scores, name)
            error = relative_error(V, with_bias(layer), statistics)
            _write(layer, V)
            changed = True
            yield (
                PrunedLayer(
                    layer=name,
                    pattern=str(form.pattern),
                    sparsity=1.0 - float(mask.float().mean()),
                    relative_error=error,
                    damping=damping,
                    seconds=time.perf_counter() - started,
                ),
                pruned,
            )
        if stage:
            with torch.no_grad():
                dense_in = [dense_stage(batch) for batch in dense_in]
                pruned_in = [pruned_stage(batch) for batch in pruned_in]


def _solve(
    layer: nn.Linear,
    form: Form,
    statistics: Statistics,
    settings: Settings,
    scores: Scores | None,
    name: str,
) -> tuple[Tensor, Tensor, float]:
    """The new weight (N, K) with its bias column, the block mask, and the damping used."""
    W = with_bias(layer)
    pattern = form.pattern
    system = normal_equations(W, statistics, damping=settings.damping, free=layer.in_features)
    if form.sparsity == 0.0:
        return unmasked_solution(system), torch.ones(1, 1), system.damping
    if settings.selection == "obs":
        costs = removal_costs(unmasked_solution(system), system, pattern, steps=settings.steps)
    elif settings.selection == "magnitude":
        costs = block_sums(layer.weight.detach().square(), pattern)
    elif scores is None or name not in scores:
        raise PruningError("selection 'scores' needs a score for every block of this layer")
    else:
        costs = scores[name]
    mask = choose_mask(costs, pattern, sparsity=form.sparsity)
    if settings.repair:
        return resolve(system, mask, pattern), mask, system.damping
    V = W.double()
    V[:, : layer.in_features] *= expand(mask, pattern)
    return V, mask, system.damping


def block_sums(values: Tensor, pattern: Pattern) -> Tensor:
    """Sum a weight-shaped tensor (N, K) over each block: (N / rows, K / cols)."""
    N, K = values.shape
    rows, cols = pattern.rows, pattern.cols
    return values.reshape(N // rows, rows, K // cols, cols).sum((1, 3))


def _write(layer: nn.Linear, V: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(V[:, : layer.in_features])
        if layer.bias is not None:
            layer.bias.copy_(V[:, -1])


def _linears(model: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Linear]:
    found = {name: model.get_submodule(name) for name in names}
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Put the layer's name before a PruningError."""
    try:
        yield
    except PruningError as error:
        raise PruningError(f"{layer}: {error}") from error


def _refuse_poor_calibration(layers: tuple[LayerShape, ...], images: Tensor) -> None:
    if len(images) > 1 and bool((images == images[:1]).all()):
        raise PruningError(
            f"all {len(images)} calibration images are alike; take images as they come from the "
            "line, of every class"
        )
    refuse_few_images(layers, len(images))


def refuse_few_images(layers: tuple[LayerShape, ...], count: int) -> None:
    """Raise PruningError when so few images cannot give every Hessian its full rank."""
    neediest = max(layers, key=lambda layer: layer.in_features / layer.tokens)
    tokens = neediest.tokens * count
    if tokens < neediest.in_features:
        needed = -(-neediest.in_features // neediest.tokens)
        raise PruningError(
            f"{neediest.name}: {count} calibration images give {tokens} tokens, fewer than "
            f"its {neediest.in_features} inputs; use at least {needed} images, better {8 * needed}"
        )


def _refuse_misfits(layers: tuple[LayerShape, ...], forms: Mapping[str, Form]) -> None:
    shapes = {layer.name: layer for layer in layers}
    for name, form in forms.items():
        if name not in shapes:
            raise PruningError(f"{name}: the model has no such prunable layer")
        if form.pattern.kind == "2:4" and form.sparsity != TWO_FOUR_SPARSITY:
            raise PruningError(
                f"{name}: sparsity {form.sparsity} in 2:4, which has one only: {TWO_FOUR_SPARSITY}"
            )
        shape = shapes[name]
        if not form.pattern.fits(shape.out_features, shape.in_features):
            raise PruningError(
                f"{name}: {form.pattern} does not divide its weight "
                f"({shape.out_features} x {shape.in_features}); {_way_out(form.pattern, shape)}"
            )


def _way_out(pattern: Pattern, shape: LayerShape) -> str:
    if pattern.kind == "2:4":
        return f"leave it dense: 2:4 needs inputs by fours, not {shape.in_features}"
    return f"choose rows dividing {shape.out_features} and columns dividing {shape.in_features}"
