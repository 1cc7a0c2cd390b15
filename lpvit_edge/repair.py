"""Choose blocks by group OBS and re-solve the weights that remain, in closed form.

Symbols: W (N, K) the weight of a linear layer, x (K,) what the dense model feeds it, z (K,) what
the already pruned prefix feeds it, A = E[z z^T], B = E[W x z^T]. The repaired weight minimizes

    E |W x - V z|^2 + lam |V - W|^2        over V with zeros outside the kept blocks,

so errors that the prefix has already made are corrected as far as this layer can. For z = x and
no mask this gives V = W. With the bias as a last column of W and a constant 1 at the end of x and
z the same formulas correct the bias too.

Sources: the removal cost w_j ([A^-1]_jj)^-1 w_j^T of a group of columns and the update of the rest
are Optimal Brain Surgeon (Hassibi & Stork 1993, eq. 5) in the layer-wise, grouped form of OBC
(Frantar & Alistarh 2022, arXiv 2208.11580, eqs. 2 to 4 and section 4); the solution on a mask is
SparseGPT's eq. 2 (arXiv 2301.00774); the block shapes are LPViT's (arXiv 2407.02068). The
asymmetric target E|W x - V z|^2 and the batched elimination are our own choices.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor

from lpvit_edge.errors import PruningError
from lpvit_edge.pattern import Pattern
from lpvit_edge.two_four import resolve_rows, two_four_costs, two_of_four

# Share of the Hessian's mean diagonal that is added to its diagonal; see docs/method.md.
DAMPING = 0.001


class Statistics(msgspec.Struct, kw_only=True):
    """Second moments of one layer's inputs; K counts the constant 1 when there is a bias."""

    A: Tensor  # (K, K) float64, E[z z^T]
    B: Tensor  # (N, K) float64, E[W x z^T]
    target_energy: float  # E |W x|^2
    tokens: int


class System(msgspec.Struct, frozen=True, kw_only=True):
    """The normal equations of one layer: V A = B, damped."""

    A: Tensor  # (K, K) float64, positive definite
    B: Tensor  # (N, K) float64
    free: int  # columns that may be pruned; a constant column after them never is
    damping: float


def normal_equations(W: Tensor, statistics: Statistics, *, damping: float, free: int) -> System:
    """A + lam I and E[W x z^T] + lam W, with lam = damping * mean(diag A).

    W (N, K) includes the bias column where the statistics have one. Raises PruningError when
    the statistics are not finite or all zero.
    """
    A, B = statistics.A, statistics.B
    refuse_unfit(A[:free, :free])
    if not bool(torch.isfinite(B).all()):
        raise PruningError("its outputs hold NaN or Inf; check the weights")
    lam = damping * float(A.diagonal()[:free].mean())
    damped = A.clone()
    damped.diagonal().add_(lam)
    return System(A=damped, B=B + lam * W.to(A.dtype), free=free, damping=lam)


@contextmanager
def about_layer(name: str) -> Iterator[None]:
    """Put the layer's name before a PruningError."""
    try:
        yield
    except PruningError as error:
        raise PruningError(f"{name}: {error}") from error


def cholesky(A: Tensor) -> Tensor:
    """Lower factor of A (K, K); raises PruningError with the remedy when A is not definite."""
    L: Tensor
    L, info = torch.linalg.cholesky_ex(A)
    if int(info):
        raise PruningError(
            f"the Hessian of its inputs ({len(A)} x {len(A)}) is not positive definite; use more "
            "or more varied calibration images, or a larger damping"
        )
    return L


def refuse_unfit(A: Tensor) -> None:
    """Raise PruningError for a second moment (K, K) of inputs that are not finite or all zero."""
    if not bool(torch.isfinite(A).all()):
        raise PruningError("its inputs hold NaN or Inf; check the images and the weights")
    if float(A.diagonal().mean()) <= 0.0:
        raise PruningError("its inputs are all zero on the calibration images")


def unmasked_solution(system: System) -> Tensor:
    """V (N, K) that minimizes the objective with nothing pruned."""
    solution: Tensor = torch.cholesky_solve(system.B.T, cholesky(system.A)).T
    return solution


def removal_costs(
    V: Tensor, system: System, pattern: Pattern, *, row_weights: Tensor | None = None, steps: int
) -> Tensor:
    """What removing each block costs, in the order in which group OBS would remove them.

    V (N, K) the unmasked solution. Returns (N / rows, free / cols): entry (b, j) is the rise of
    the objective when block j of block row b goes, the cheaper ones having gone before; along
    that order it never falls, so the k cheapest blocks of a layer are a valid state of the
    elimination. The inverse Hessian is updated after each of `steps` batches, not after each
    block. `row_weights` (N,) weighs the output rows (None: equally). For 2:4 see
    lpvit_edge.two_four.two_four_costs, which takes no steps.
    """
    N, rows = len(V), pattern.rows
    full = torch.cholesky_inverse(cholesky(system.A))
    scaled = V if row_weights is None else V * row_weights.to(V).sqrt()[:, None]
    if pattern.kind == "2:4":
        return two_four_costs(scaled, full, system.free)
    inverse, scaled = full.to(torch.float32), scaled.to(torch.float32)
    return torch.stack(
        [
            _eliminate(scaled[b : b + rows], inverse, pattern.cols, system.free, steps=steps)
            for b in range(0, N, rows)
        ]
    )


def _eliminate(W: Tensor, P: Tensor, cols: int, free: int, *, steps: int) -> Tensor:
    """Costs (free / cols,) of one block row; W (rows, K), P (K, K) the inverse Hessian."""
    groups = free // cols
    costs = torch.zeros(groups, device=W.device)
    alive = torch.arange(groups, device=W.device)
    batch = max(1, -(-groups // steps))
    floor = 0.0
    while len(alive) > batch:
        scores = _scores(W, P, cols, len(alive))
        order = scores.argsort()
        gone, stay = order[:batch], order[batch:].sort().values
        # A later group never counts as cheaper than one that had to go before it.
        ranked = scores[gone].clamp(min=floor).cummax(0).values
        costs[alive[gone]] = ranked
        floor = float(ranked[-1])
        W, P = _remove(W, P, _columns(gone, cols), _columns(stay, cols), len(alive) * cols)
        alive = alive[stay]
    rest = _scores(W, P, cols, len(alive))
    costs[alive] = rest.clamp(min=floor)
    return costs


def _scores(W: Tensor, P: Tensor, cols: int, groups: int) -> Tensor:
    """sum_i w_ij (P_jj)^-1 w_ij^T for each group j: (groups,)."""
    if cols == 1:
        return W[:, :groups].square().sum(0) / P.diagonal()[:groups]
    blocks = _diagonal_blocks(P, cols, groups)
    w = W[:, : groups * cols].reshape(len(W), groups, cols).permute(1, 2, 0)  # (groups, cols, rows)
    scores: Tensor = (w * torch.linalg.solve(blocks, w)).sum((1, 2))
    return scores


def _diagonal_blocks(P: Tensor, cols: int, groups: int) -> Tensor:
    square = P[: groups * cols, : groups * cols].reshape(groups, cols, groups, cols)
    return square.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _columns(groups: Tensor, cols: int) -> Tensor:
    return (groups[:, None] * cols + torch.arange(cols, device=groups.device)).reshape(-1)


def _remove(W: Tensor, P: Tensor, gone: Tensor, stay: Tensor, pruned: int) -> tuple[Tensor, Tensor]:
    """OBS update: the kept columns take over what the removed ones did."""
    constant = torch.arange(pruned, P.shape[1], device=P.device)
    stay = torch.cat([stay, constant])
    cross = P[gone][:, stay]
    factor = torch.linalg.solve(P[gone][:, gone], cross)
    return W[:, stay] - W[:, gone] @ factor, P[stay][:, stay] - cross.T @ factor


def choose_mask(costs: Tensor, pattern: Pattern, *, sparsity: float) -> Tensor:
    """Boolean mask shaped like `costs`: (N / rows, K / cols) for blocks, (N, K) for 2:4."""
    return two_of_four(costs) if pattern.kind == "2:4" else keep_mask(costs, sparsity=sparsity)


def keep_mask(costs: Tensor, *, sparsity: float) -> Tensor:
    """Boolean mask shaped like `costs` that drops the cheapest share of the blocks."""
    dropped = round(sparsity * costs.numel())
    keep = torch.ones(costs.numel(), dtype=torch.bool, device=costs.device)
    keep[costs.flatten().argsort(stable=True)[:dropped]] = False
    return keep.view(costs.shape)


def resolve(system: System, mask: Tensor | None, pattern: Pattern) -> Tensor:
    """V (N, K) with zeros outside the kept blocks and the rest solved exactly.

    mask (N / rows, free / cols), for 2:4 (N, free); None where nothing is pruned. For each
    block row with kept columns S (and the constant): V_S = B_S (A_SS)^-1.
    """
    if mask is None:
        return unmasked_solution(system)
    if pattern.kind == "2:4":
        return resolve_rows(system.A, system.B, mask)
    V = torch.zeros_like(system.B)
    constant = torch.arange(system.free, len(system.A), device=system.A.device)
    for row, kept in enumerate(mask):
        S = torch.cat([_columns(kept.nonzero()[:, 0], pattern.cols), constant])
        if not len(S):
            continue
        rows = slice(row * pattern.rows, (row + 1) * pattern.rows)
        L = cholesky(system.A[S][:, S])
        V[rows, S] = torch.cholesky_solve(system.B[rows][:, S].T, L).T
    return V


def expand(mask: Tensor, pattern: Pattern) -> Tensor:
    """Block mask (N / rows, K / cols) to weight mask (N, K)."""
    return mask.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)


def relative_error(V: Tensor, statistics: Statistics) -> float:
    """E|W x - V z|^2 / E|W x|^2; V (N, K) with the bias column where there is one."""
    cross = float((statistics.B * V).sum())
    own = float(((V @ statistics.A) * V).sum())
    return max(0.0, statistics.target_energy - 2 * cross + own) / statistics.target_energy
