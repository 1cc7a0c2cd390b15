"""Prune a model layer by layer, each repaired on what the already pruned prefix feeds it."""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping

import msgspec
import torch
from torch import Tensor, nn

from lpvit_edge.distributed import refuse_idle, share
from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk
from lpvit_edge.pattern import COMMON, TWO_FOUR_SPARSITY, Pattern, parse_pattern
from lpvit_edge.permute import reorder_stage
from lpvit_edge.records import LayerShape, PrunedLayer
from lpvit_edge.repair import about_layer, relative_error
from lpvit_edge.solve import Form, Scores, Settings, block_sums, solve_layer
from lpvit_edge.statistics import each_input, layer_statistics, stage_input, stage_pass

__all__ = [
    "DoneLayer",
    "Form",
    "Scores",
    "Settings",
    "block_sums",
    "prune",
    "refuse_few_images",
    "refuse_poor_calibration",
    "refuse_useless_patterns",
]


class DoneLayer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer that an earlier, interrupted run has pruned."""

    entry: PrunedLayer
    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)


def prune(
    model: nn.Module,
    walk: Walk,
    forms: Mapping[str, Form],
    images: Tensor,
    *,
    settings: Settings | None = None,
    scores: Scores | None = None,
    row_weights: Mapping[str, Tensor] | None = None,
    done: Mapping[str, DoneLayer] | None = None,
) -> Iterator[tuple[PrunedLayer, nn.Module]]:
    """Prune layer after layer; each item is what happened to a layer, and the model so far.

    images (n, 3, S, S), normalized. A layer that `forms` leaves dense is re-solved without a mask
    once the prefix before it has changed. Layers in `done` are taken as they are, so that a run
    goes on where it was interrupted. row_weights: layer -> (N,), how much each of its outputs
    counts when blocks are chosen (lpvit_edge.sensitivity.output_fisher; by default equally). The
    given model stays as it is. Raises PruningError, naming the layer and the remedy.
    """
    settings = settings or Settings()
    refuse_poor_calibration(walk.layers, images)
    _refuse_misfits(walk.layers, forms)
    if settings.permute and row_weights:
        raise PruningError("row weights are of the model's own order of neurons; leave out permute")
    pruned = copy.deepcopy(model)
    if settings.permute:
        model = copy.deepcopy(model)  # is reordered as the pruned one is
    run = _Run(
        model=model,
        pruned=pruned,
        forms=forms,
        settings=settings,
        scores=scores or {},
        row_weights=row_weights or {},
    )
    starts = range(0, len(images), settings.batch)
    refuse_idle(len(starts))
    batches = [images[start : start + settings.batch] for start in share(starts)]
    first = walk.stages[0][0]
    dense_in = [stage_input(model, first, batch) for batch in batches] if first else batches
    pruned_in = dense_out = dense_in
    inputs: dict[str, list[Tensor]] = {}
    for stage, names in walk.stages:
        dense_stage, pruned_stage = model.get_submodule(stage), pruned.get_submodule(stage)
        known = run.known(names, done or {}) if stage else dict(done or {})
        if stage and settings.permute and not known:
            reorder_stage((model, pruned), stage, names, forms, dense_in)
        if stage:
            needed = {name: _linear(model, name) for name in names if name not in known}
            inputs, dense_out = stage_pass(dense_stage, needed, dense_in)
        for name in names:
            if name in known:
                entry = run.take(name, known[name])
            elif not run.concerns(name):
                continue
            else:
                x = inputs.pop(name) if stage else each_input(model, _linear(model, name), batches)
                entry = run.prune_layer(name, pruned_stage, pruned_in, x)
            yield entry, pruned
        if stage:
            _, pruned_in = stage_pass(pruned_stage, {}, pruned_in)
            dense_in = dense_out


class _Run(msgspec.Struct, kw_only=True):
    """One pass over the layers of a model."""

    model: nn.Module
    pruned: nn.Module
    forms: Mapping[str, Form]
    settings: Settings
    scores: Scores
    row_weights: Mapping[str, Tensor]
    changed: bool = False  # whether any layer before the next one has changed

    def concerns(self, name: str) -> bool:
        """Whether the layer changes at all: pruned, or correcting what came before it."""
        return self._form(name).sparsity > 0.0 or (self.changed and self.settings.repair)

    def known(self, names: tuple[str, ...], done: Mapping[str, DoneLayer]) -> dict[str, DoneLayer]:
        """The layers of a stage that an earlier run has pruned.

        In a stage that may be reordered all or none: its layers must agree on one order.
        """
        found = {name: done[name] for name in names if name in done}
        first = next((i for i, name in enumerate(names) if self.concerns(name)), len(names))
        expected = names[first:] if self.settings.repair else [*filter(self.concerns, names)]
        whole = all(name in found for name in expected)
        return found if whole or not self.settings.permute else {}

    def _form(self, name: str) -> Form:
        return self.forms.get(name, Form())

    def prune_layer(
        self, name: str, stage: nn.Module, batches: list[Tensor], x: Iterable[Tensor]
    ) -> PrunedLayer:
        started = time.perf_counter()
        layer, dense_layer = _linear(self.pruned, name), _linear(self.model, name)
        form = self._form(name)
        with about_layer(name):
            statistics = layer_statistics(stage, layer, batches, dense_layer, x)
            solved = solve_layer(
                layer,
                form,
                statistics,
                self.settings,
                self.scores.get(name),
                self.row_weights.get(name),
            )
        error = relative_error(solved.V, statistics)
        bias = None if layer.bias is None else solved.V[:, -1]
        self._write(layer, solved.V[:, : layer.in_features], bias)
        return PrunedLayer(
            layer=name,
            pattern=str(form.pattern),
            sparsity=solved.sparsity,
            relative_error=error,
            damping=solved.damping,
            damping_share=self.settings.damping,
            seconds=time.perf_counter() - started,
        )

    def take(self, name: str, done: DoneLayer) -> PrunedLayer:
        """Put in what an earlier run made of the layer."""
        self._write(_linear(self.pruned, name), done.weight, done.bias)
        return done.entry

    def _write(self, layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        self.changed = True


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def refuse_poor_calibration(layers: tuple[LayerShape, ...], images: Tensor) -> None:
    """Raise PruningError for images (n, 3, S, S) from which no layer can be repaired."""
    if not bool(torch.isfinite(images).all()):
        raise PruningError("the calibration images hold NaN or Inf; check the preprocessing")
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


def refuse_useless_patterns(layers: tuple[LayerShape, ...], patterns: Iterable[str]) -> None:
    """Raise PruningError, naming the sizes and what would fit, for a pattern that fits no layer."""
    sizes = dict.fromkeys((layer.out_features, layer.in_features) for layer in layers)
    for text in patterns:
        pattern = parse_pattern(text)
        if any(pattern.fits(*size) for size in sizes):
            continue
        fitting = [known for known in COMMON if any(parse_pattern(known).fits(*s) for s in sizes)]
        raise PruningError(
            f"pattern {text} divides none of the {len(layers)} prunable layers (out_features x "
            f"in_features: {', '.join(f'{rows} x {cols}' for rows, cols in sizes)}); rows must "
            f"divide the first number and columns the second, such as {', '.join(fitting)}"
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
