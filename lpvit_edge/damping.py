"""How much is added to a Hessian's diagonal, chosen for each layer on images kept apart.

The more images there are for the columns of a layer, the less has to be added; too little fits the
noise of few images. Each step of a short ladder solves some rows of the layer on one part of the
images, and the rest judges. Symbols as in lpvit_edge.repair.
"""

import torch
from torch import Tensor

from lpvit_edge.errors import PruningError
from lpvit_edge.pattern import Pattern
from lpvit_edge.repair import DAMPING, Split, System, normal_equations, resolve

LADDER = (1e-4, 1e-3, 1e-2, 1e-1)
_ROWS = 512  # that are solved for each step


def choose_damping(
    W: Tensor, split: Split | None, pattern: Pattern, mask: Tensor | None, *, free: int
) -> float:
    """The step of LADDER that errs least on the images kept apart; DAMPING where there are none.

    mask as in lpvit_edge.repair.resolve.
    """
    if split is None:
        return DAMPING
    groups = len(W) // pattern.rows
    count = min(groups, max(1, _ROWS // pattern.rows))
    chosen = torch.arange(count, device=W.device) * groups // count
    rows = chosen[:, None] * pattern.rows + torch.arange(pattern.rows, device=W.device)
    part = None if mask is None else mask[chosen]
    errors = {
        share: error
        for share in LADDER
        if (error := _error(W, split, pattern, part, rows.flatten(), share, free)) is not None
    }
    return min(errors, key=lambda share: errors[share]) if errors else LADDER[-1]


def _error(
    W: Tensor,
    split: Split,
    pattern: Pattern,
    mask: Tensor | None,
    rows: Tensor,
    share: float,
    free: int,
) -> float | None:
    """E|W x - V z|^2 over some rows, less what no V changes; None where V cannot be solved for."""
    system = normal_equations(W, split.fit, damping=share, free=free)
    part = System(A=system.A, B=system.B[rows], free=free, damping=system.damping)
    try:
        V = resolve(part, mask, pattern)
    except PruningError:
        return None  # not definite: too little was added
    return float(((V @ split.apart.A) * V).sum() - 2 * (split.apart.B[rows] * V).sum())
