"""The ways to prune that the benchmark compares, each from a subject to a pruned model.

All get the same calibration images and share of the prunable layers' MACs; none is retrained.
Uniform means the same share in every layer that the pattern divides.
"""

import copy
from collections.abc import Callable, Mapping

import msgspec
import torch
from torch import Tensor, nn

from benchmarks import pruning_peers as peers
from benchmarks.pruning_allocation import allocated_forms, uniform_forms
from benchmarks.pruning_sparsegpt import sparsegpt
from benchmarks.pruning_subject import Subject
from lpvit_edge.pattern import Pattern
from lpvit_edge.prune import Form, block_sums, prune
from lpvit_edge.repair import choose_mask, expand
from lpvit_edge.sensitivity import taylor_scores

BLOCKS = ("64x1", "64x16", "32x32", "64x64")
EVERY = (*BLOCKS, "2:4")
STRUCTURED = "structured"  # whole neurons and head channels: Torch-Pruning's only shape


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """A pruned model, and the distortion that an allocation predicted for it."""

    model: nn.Module
    distortion: float | None = None


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """One contestant: `prunes(subject, pattern, sparsity)` in the patterns it knows."""

    label: str
    prunes: Callable[[Subject, Pattern, float], Outcome]
    patterns: tuple[str, ...]
    needs: str | None = None  # a package beyond lpvit-edge's own


def _magnitude(subject: Subject, pattern: Pattern, sparsity: float) -> Outcome:
    """Blocks (2:4: weights) of the smallest squared norm go, uniformly; mask only."""
    forms = uniform_forms(subject, pattern, sparsity)
    scores = {name: _squares(subject.linear(name).weight, pattern) for name in forms}
    return Outcome(model=masked(subject, forms, scores))


def _squares(weight: Tensor, pattern: Pattern) -> Tensor:
    squares = weight.detach().square()
    return squares if pattern.kind == "2:4" else block_sums(squares, pattern)


def _lpvit(subject: Subject, pattern: Pattern, sparsity: float) -> Outcome:
    """LPViT without its fine-tuning: Taylor rank, one slope for all layers, mask only."""
    forms, distortion = allocated_forms(
        subject, pattern, sparsity, criterion="taylor", allocator="slope"
    )
    scores = {
        name: taylor_scores(subject.moments[name], pattern, images=len(subject.images))
        for name in forms
    }
    return Outcome(model=masked(subject, forms, scores), distortion=distortion)


def masked(subject: Subject, forms: Mapping[str, Form], scores: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which the blocks of the lowest scores are zero and nothing else changed."""
    model = copy.deepcopy(subject.module)
    for name, form in forms.items():
        mask = choose_mask(scores[name], form.pattern, sparsity=form.sparsity)
        with torch.no_grad():
            subject.linear(name, of=model).weight.mul_(expand(mask, form.pattern))
    return model


def _sparsegpt(subject: Subject, pattern: Pattern, sparsity: float) -> Outcome:
    return Outcome(model=sparsegpt(subject, pattern, sparsity))


def _uniform(subject: Subject, pattern: Pattern, sparsity: float) -> Outcome:
    """As `lpvit sensitivity` does by default: rotated for blocks, as it is for 2:4."""
    basis = subject if pattern.kind == "2:4" else subject.rotated
    return _uniform_as_it_is(basis, pattern, sparsity)


def _uniform_as_it_is(subject: Subject, pattern: Pattern, sparsity: float) -> Outcome:
    return Outcome(model=repaired(subject, uniform_forms(subject, pattern, sparsity)))


def _allocated(subject: Subject, pattern: Pattern, sparsity: float) -> Outcome:
    return _allocated_as_it_is(subject.rotated, pattern, sparsity)


def _allocated_as_it_is(subject: Subject, pattern: Pattern, sparsity: float) -> Outcome:
    forms, distortion = allocated_forms(
        subject, pattern, sparsity, criterion="hessian", allocator="milp"
    )
    return Outcome(model=repaired(subject, forms), distortion=distortion)


def repaired(
    subject: Subject, forms: Mapping[str, Form], *, row_weights: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """lpvit-edge's own pruning with its default settings; row_weights: how much outputs count."""
    model = subject.module
    for _, pruned in prune(
        subject.module, subject.walk, forms, subject.images, row_weights=row_weights
    ):
        model = pruned
    return model


def _peer(prunes: Callable[..., nn.Module]) -> Callable[[Subject, Pattern, float], Outcome]:
    return lambda subject, _, sparsity: Outcome(model=prunes(subject, sparsity))


METHODS: dict[str, Method] = {
    "magnitude": Method(label="magnitude, mask only", prunes=_magnitude, patterns=EVERY),
    "lpvit": Method(label="LPViT, mask only", prunes=_lpvit, patterns=BLOCKS),
    "sparsegpt": Method(label="SparseGPT, uniform", prunes=_sparsegpt, patterns=EVERY),
    "modelopt_magnitude": Method(
        label="Model Optimizer sparse_magnitude",
        prunes=_peer(peers.modelopt_magnitude),
        patterns=("2:4",),
        needs="nvidia-modelopt",
    ),
    "modelopt_sparsegpt": Method(
        label="Model Optimizer sparsegpt",
        prunes=_peer(peers.modelopt_sparsegpt),
        patterns=("2:4",),
        needs="nvidia-modelopt",
    ),
    "torch_pruning": Method(
        label="Torch-Pruning, Taylor",
        prunes=_peer(peers.torch_pruning),
        patterns=(STRUCTURED,),
        needs="torch-pruning",
    ),
    "uniform_as_it_is": Method(
        label="lpvit-edge, uniform, not rotated", prunes=_uniform_as_it_is, patterns=BLOCKS
    ),
    "allocated_as_it_is": Method(
        label="lpvit-edge, allocated, not rotated", prunes=_allocated_as_it_is, patterns=BLOCKS
    ),
    "uniform": Method(label="lpvit-edge, uniform", prunes=_uniform, patterns=EVERY),
    "allocated": Method(label="lpvit-edge, allocated", prunes=_allocated, patterns=BLOCKS),
}
