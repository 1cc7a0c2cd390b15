"""Prune a model layer by layer, each repaired on what the already pruned prefix feeds it."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec
import torch
from torch import Tensor, nn

from lpvit_edge.distributed import refuse_idle, share
from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk
from lpvit_edge.permute import reorder_stage
from lpvit_edge.prune_refusals import (
    refuse_broken_weights,
    refuse_misfits,
    refuse_poor_calibration,
)
from lpvit_edge.records import PrunedLayer
from lpvit_edge.repair import about_layer, relative_error
from lpvit_edge.solve import Form, Scores, Settings, block_sums, solve_layer
from lpvit_edge.statistics import each_input, layer_statistics, stage_input, stage_pass

__all__ = ["DoneLayer", "Form", "Scores", "Settings", "block_sums", "prune"]


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

    images (n, 3, S, S), normalized, on the model's device. A layer that `forms` leaves dense is
    re-solved without a mask once the prefix before it has changed. Layers in `done` are taken as
    they are, so that a run goes on where it was interrupted. row_weights: layer -> (N,), how much
    each of its outputs counts when blocks are chosen (lpvit_edge.sensitivity.output_fisher; by
    default equally). The given model stays as it is. Raises PruningError, naming the layer and the
    remedy.
    """
    settings = settings or Settings()
    refuse_broken_weights(model)
    refuse_poor_calibration(walk.layers, images)
    refuse_misfits(walk.layers, forms)
    if settings.permute and row_weights:
        raise PruningError("row weights are of the model's own order of neurons; leave out permute")
    starts = range(0, len(images), settings.batch)
    refuse_idle(len(starts))
    run = _Run(
        # Reordered as the pruned one is, when it is.
        model=copy.deepcopy(model) if settings.permute else model,
        pruned=copy.deepcopy(model),
        forms=forms,
        settings=settings,
        scores=scores or {},
        row_weights=row_weights or {},
        done=done or {},
        batches=[images[start : start + settings.batch] for start in share(starts)],
    )
    if walk.stages[0][0]:
        run.enter(walk.stages[0][0])
    for stage, names in walk.stages:
        for entry in run.in_stage(stage, names) if stage else run.in_whole(names):
            yield entry, run.pruned


class _Run(msgspec.Struct, kw_only=True):
    """One pass over the layers of a model."""

    model: nn.Module
    pruned: nn.Module
    forms: Mapping[str, Form]
    settings: Settings
    scores: Scores
    row_weights: Mapping[str, Tensor]
    done: Mapping[str, DoneLayer]
    batches: list[Tensor]  # of images
    dense_in: list[Tensor] = []  # what the next stage receives, in the dense model
    pruned_in: list[Tensor] = []
    changed: bool = False  # whether any layer before the next one has changed

    def enter(self, first: str) -> None:
        """Run the images up to the first stage."""
        self.dense_in = [stage_input(self.model, first, batch) for batch in self.batches]
        self.pruned_in = self.dense_in

    def in_whole(self, names: tuple[str, ...]) -> Iterator[PrunedLayer]:
        """Prune the layers of a model whose blocks form no chain: each from the images on."""

        def received(name: str) -> Iterable[Tensor]:
            return each_input(self.model, _linear(self.model, name), self.batches)

        yield from self._layers(names, self.done, self.pruned, self.batches, received)

    def in_stage(self, stage: str, names: tuple[str, ...]) -> Iterator[PrunedLayer]:
        """Prune the layers of the next stage, and step behind it."""
        known = self.known(names)
        if self.settings.permute and not known:
            reorder_stage((self.model, self.pruned), stage, names, self.forms, self.dense_in)
        dense, pruned = (model.get_submodule(stage) for model in (self.model, self.pruned))
        needed = {name: _linear(self.model, name) for name in names if name not in known}
        inputs, dense_out = stage_pass(dense, needed, self.dense_in)
        yield from self._layers(names, known, pruned, self.pruned_in, inputs.pop)
        _, self.pruned_in = stage_pass(pruned, {}, self.pruned_in)
        self.dense_in = dense_out

    def _layers(
        self,
        names: tuple[str, ...],
        known: Mapping[str, DoneLayer],
        module: nn.Module,
        batches: list[Tensor],
        received: Callable[[str], Iterable[Tensor]],
    ) -> Iterator[PrunedLayer]:
        """Layers of a module that gets `batches`; received(name): the dense layer's inputs."""
        for name in names:
            if name in known:
                yield self.take(name, known[name])
            elif self.concerns(name):
                yield self.prune_layer(name, module, batches, received(name))

    def concerns(self, name: str) -> bool:
        """Whether the layer changes at all: pruned, or correcting what came before it."""
        return self._form(name).sparsity > 0.0 or (self.changed and self.settings.repair)

    def known(self, names: tuple[str, ...]) -> dict[str, DoneLayer]:
        """The layers of a stage that an earlier run has pruned.

        In a stage that may be reordered all or none: its layers must agree on one order.
        """
        found = {name: self.done[name] for name in names if name in self.done}
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
