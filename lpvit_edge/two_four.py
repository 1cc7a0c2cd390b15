"""Choose two of four neighbouring weights along the inputs, and re-solve every row on its mask.

Symbols as in lpvit_edge.repair. The sweep over the columns, each row with updates of its own and
one inverse Hessian for all, is SparseGPT's (Frantar & Alistarh 2023, arXiv 2301.00774, eqs. 3 to
5: the Cholesky factor of A^-1 holds the inverse over the columns not yet passed). Two things
differ: the pair to go is the one whose joint OBS cost is lowest, of all six, and afterwards each
row is solved exactly on its mask, so that columns already passed are corrected too.
"""

import itertools

import torch
from torch import Tensor

from lpvit_edge.errors import PruningError

PAIRS = tuple(itertools.combinations(range(4), 2))
_PANEL = 128  # columns after which the weights further right are brought up to date
_CHUNK_BYTES = 1 << 28  # of Hessians gathered at once


def two_four_costs(V: Tensor, inverse: Tensor, free: int) -> Tensor:
    """Costs (N, free) whose two lowest in each group of four are the weights that go.

    V (N, K) the unmasked solution; inverse (K, K) = A^-1. A pair that goes carries half its joint
    cost w_p ([A^-1]_pp)^-1 w_p^T on each of its weights, a weight that stays costs infinity.
    """
    U = torch.linalg.cholesky(inverse, upper=True)
    W = V.to(U.dtype).clone()
    costs = torch.full((len(W), free), torch.inf, dtype=U.dtype, device=U.device)
    for start in range(0, free, _PANEL):
        end = min(start + _PANEL, free)
        done = torch.zeros(len(W), end - start, dtype=U.dtype, device=U.device)
        for four in range(start, end, 4):
            here = slice(four, four + 4)
            gone, cost, step = _cheapest_pair(W[:, here], U[here, here])
            costs[:, here].scatter_(1, gone, (cost / 2)[:, None].expand(-1, 2))
            done[:, four - start : four - start + 4] = step
            W[:, four:end] -= step @ U[here, four:end]
        W[:, end:] -= done @ U[start:end, end:]
    return costs


def _cheapest_pair(w: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns (N, 2) to go, their joint cost (N,), and the step (N, 4) of the update.

    w (N, 4) the weights as they are now, U (4, 4) the factor of A^-1 over the columns from here on.
    """
    P = U.T @ U
    pairs = torch.tensor(PAIRS, device=w.device)
    inverses = torch.linalg.inv(P[pairs[:, :, None], pairs[:, None, :]])  # (6, 2, 2)
    candidates = w[:, pairs]  # (N, 6, 2)
    multipliers = torch.einsum("npi,pij->npj", candidates, inverses)
    cost, best = (multipliers * candidates).sum(2).min(1)
    gone = pairs[best]
    chosen = multipliers[torch.arange(len(w), device=w.device), best]
    step = torch.zeros_like(w).scatter_(1, gone, chosen) @ U.T
    return gone, cost, step


def two_of_four(costs: Tensor) -> Tensor:
    """Boolean mask (N, K) that drops the two cheapest weights in each group of four."""
    fours = costs.reshape(len(costs), -1, 4)
    gone = fours.argsort(dim=2, stable=True)[:, :, :2]
    keep = torch.ones_like(fours, dtype=torch.bool)
    return keep.scatter_(2, gone, False).reshape(costs.shape)


def resolve_rows(A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    """V (N, K) with zeros outside mask (N, free), each row the exact solution on its own columns.

    A (K, K), B (N, K) of lpvit_edge.repair.System; columns from `free` on are always kept. Every
    row keeps equally many columns S, so rows are solved in batches: V_S = B_S (A_SS)^-1.
    """
    constant = torch.ones(len(mask), len(A) - mask.shape[1], dtype=torch.bool, device=mask.device)
    kept = torch.cat([mask, constant], 1)
    columns = kept.nonzero()[:, 1].reshape(len(mask), -1)
    size = columns.shape[1]
    V = torch.zeros_like(B)
    chunk = max(1, _CHUNK_BYTES // (A.element_size() * size**2))
    for rows in (slice(start, start + chunk) for start in range(0, len(B), chunk)):
        S = columns[rows]
        L, info = torch.linalg.cholesky_ex(A[S[:, :, None], S[:, None, :]])
        if bool(info.any()):
            raise PruningError(
                f"the Hessian of its inputs ({len(A)} x {len(A)}) is not positive definite; use "
                "more or more varied calibration images, or a larger damping"
            )
        b = B[rows].gather(1, S)
        V[rows] = V[rows].scatter(1, S, torch.cholesky_solve(b[:, :, None], L)[:, :, 0])
    return V
