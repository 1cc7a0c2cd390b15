"""An order of columns in which 2:4 costs least: large weights spread over the groups of four.

Two of four neighbours must go in every row, so a row whose large weights sit side by side loses one
of them. Reordering channels against this is Pool & Yu 2021 (NeurIPS, "Channel permutations for N:M
sparsity"), who swap columns between groups; here two groups at a time are divided anew in the best
of the 35 ways, many disjoint pairs of groups at once.
"""

import itertools

import torch
from torch import Tensor

_ROUNDS = 60
_ROWS = 256  # of the weight that are looked at, evenly spread
_CHUNK = 1 << 22  # numbers held at once for each of the 70 groups of four
FOURS = tuple(itertools.combinations(range(8), 4))  # the k-th and the k-th from the end are a split


def spread(saliency: Tensor) -> Tensor:
    """An order of the columns (m,) in which the two best of every four together keep most.

    saliency (N, m), m a multiple of 4. Every change keeps more than before, so the order as it is
    stays where nothing is better.
    """
    N, m = saliency.shape
    rows = torch.arange(min(N, _ROWS), device=saliency.device) * N // min(N, _ROWS)
    saliency = saliency[rows]
    groups = torch.arange(m, device=saliency.device).reshape(-1, 4)
    generator = torch.Generator().manual_seed(0)
    half = len(groups) // 2
    for _ in range(_ROUNDS if half else 0):
        groups = groups[torch.randperm(len(groups), generator=generator).to(groups.device)]
        eight = torch.cat([groups[:half], groups[half : 2 * half]], 1)
        eight = torch.cat([_divided(saliency, part) for part in _parts(eight, len(rows))])
        groups = torch.cat([eight[:, :4], eight[:, 4:], groups[2 * half :]])
    return groups.flatten()


def _parts(eight: Tensor, rows: int) -> tuple[Tensor, ...]:
    size = max(1, _CHUNK // (rows * len(FOURS)))
    return eight.split(size)  # type: ignore[no-untyped-call,no-any-return]


def _divided(saliency: Tensor, eight: Tensor) -> Tensor:
    """The eight columns of each pair of groups (n, 8), its two new groups one behind the other."""
    fours = torch.tensor(FOURS, device=eight.device)
    kept = two_best(saliency[:, eight][..., fours]).sum(0)  # (n, 70)
    both = kept + kept.flip(1)
    best = both[:, : len(FOURS) // 2].argmax(1)
    best[both.gather(1, best[:, None])[:, 0] <= both[:, 0] * (1 + 1e-6)] = 0
    order = torch.cat([fours[best], fours.flip(0)[best]], 1)
    return eight.gather(1, order)


def two_best(values: Tensor) -> Tensor:
    """Sum of the two largest of the last four: (..., 4) -> (...)."""
    a, b, c, d = values.unbind(-1)
    across = torch.maximum(a, b) + torch.maximum(c, d)
    return torch.maximum(across, torch.maximum(a + b, c + d))
