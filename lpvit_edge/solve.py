"""One layer: which blocks go, and what the weights that remain become."""

from collections.abc import Mapping
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from lpvit_edge.errors import PruningError
from lpvit_edge.pattern import DENSE, Pattern
from lpvit_edge.repair import (
    DAMPING,
    Statistics,
    System,
    choose_mask,
    expand,
    normal_equations,
    removal_costs,
    resolve,
    unmasked_solution,
)
from lpvit_edge.statistics import with_bias

# layer -> scores (N / rows, K / cols) of its blocks; the blocks with small ones go first
Scores = Mapping[str, Tensor]


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
    damping: float = DAMPING  # share of the Hessian's mean diagonal that is added to its diagonal
    steps: int = 32  # batches in which the elimination removes a layer's blocks
    batch: int = 32  # images per forward pass
    permute: bool = False  # reorder neurons and channels first; see docs/method.md


class Solution(msgspec.Struct, frozen=True, kw_only=True):
    """The new weight of one layer."""

    V: Tensor  # (N, K) float64, with the bias column where there is one
    sparsity: float  # as it came out
    damping: float  # that was added to the Hessian's diagonal


def solve_layer(
    layer: nn.Linear,
    form: Form,
    statistics: Statistics,
    settings: Settings,
    scores: Tensor | None,
    row_weights: Tensor | None = None,
) -> Solution:
    """Choose the blocks of one layer and re-solve what remains. Raises PruningError.

    row_weights (N,) weigh the output rows in selection "obs": diag E[g g^T], say.
    """
    W = with_bias(layer)
    system = normal_equations(W, statistics, damping=settings.damping, free=layer.in_features)
    mask, pattern = _mask(layer, form, system, settings, scores, row_weights), form.pattern
    V = resolve(system, mask, pattern) if settings.repair else _masked(W, mask, pattern)
    kept = 1.0 if mask is None else float(mask.float().mean())
    return Solution(V=V, sparsity=1.0 - kept, damping=system.damping)


def _mask(
    layer: nn.Linear,
    form: Form,
    system: System,
    settings: Settings,
    scores: Tensor | None,
    row_weights: Tensor | None,
) -> Tensor | None:
    """What stays of the layer, by the selection that the settings name; None: all of it."""
    if form.sparsity == 0.0:
        return None
    if settings.selection == "obs":
        start = unmasked_solution(system)
        costs = removal_costs(
            start, system, form.pattern, row_weights=row_weights, steps=settings.steps
        )
    elif settings.selection == "magnitude":
        costs = block_sums(layer.weight.detach().square(), form.pattern)
    elif scores is None:
        raise PruningError("selection 'scores' needs a score for every block of this layer")
    else:
        costs = scores.to(layer.weight.device)
    return choose_mask(costs, form.pattern, sparsity=form.sparsity)


def _masked(W: Tensor, mask: Tensor | None, pattern: Pattern) -> Tensor:
    V = W.to(torch.float64)
    if mask is None:
        return V
    full = expand(mask, pattern)
    V[:, : full.shape[1]] *= full
    return V


def block_sums(values: Tensor, pattern: Pattern) -> Tensor:
    """Sum a weight-shaped tensor (N, K) over each block: (N / rows, K / cols)."""
    N, K = values.shape
    rows, cols = pattern.rows, pattern.cols
    return values.reshape(N // rows, rows, K // cols, cols).sum((1, 3))
