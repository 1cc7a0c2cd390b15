"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774), in 2:4 and carried over to blocks.

As in its paper: H = E[z z^T] over the inputs that the pruned prefix feeds the layer, damped by
1 % of its mean diagonal; U the upper Cholesky factor of H^-1; columns from left to right, each
error w_j / U_jj made up for by the columns to its right (algorithm 1); the weights to go chosen as
the sweep enters a panel, by w^2 / U_jj^2. In 2:4 the panel is four columns and each row drops two.
For blocks, which the paper does not have, a panel is 128 columns and the blocks with the lowest
summed w^2 / U_jj^2 go, equally many in each panel. Layers are pruned uniformly, biases stay.
"""

import copy

import torch
from torch import Tensor, nn

from benchmarks.pruning_subject import Subject, batches
from lpvit_edge.pattern import Pattern
from lpvit_edge.prune import block_sums
from lpvit_edge.repair import expand, keep_mask
from lpvit_edge.statistics import stage_input, stage_pass
from lpvit_edge.two_four import two_of_four

_DAMPING, _PANEL, _BATCH = 0.01, 128, 32


def sparsegpt(subject: Subject, pattern: Pattern, sparsity: float) -> nn.Module:
    """A pruned copy: every layer that the pattern divides, stage after stage."""
    pruned = copy.deepcopy(subject.module)
    fitting = {layer.name for layer in subject.fitting(pattern)}
    parts = batches(subject.images, _BATCH)
    first = subject.walk.stages[0][0]
    if first:
        parts = [stage_input(pruned, first, part) for part in parts]
    for stage, names in subject.walk.stages:
        module = pruned.get_submodule(stage)
        layers = {n: subject.linear(n, of=pruned) for n in names if n in fitting}
        for name, inputs in stage_pass(module, layers, parts)[0].items():
            swept = sweep(layers[name].weight.detach(), hessian(inputs), pattern, sparsity)
            with torch.no_grad():
                layers[name].weight.copy_(swept)
        if stage:
            parts = stage_pass(module, {}, parts)[1]
    return pruned


def hessian(inputs: list[Tensor]) -> Tensor:
    """E[z z^T] (K, K) in float64."""
    summed: Tensor = sum((z.T @ z).double() for z in inputs)  # type: ignore[assignment]
    return summed / sum(len(z) for z in inputs)


def sweep(weight: Tensor, H: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The weight (N, K) with zeros in the pattern and the rest brought up to date."""
    K = len(H)
    damped = H + _DAMPING * H.diagonal().mean() * torch.eye(K, dtype=H.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    U = torch.linalg.cholesky(inverse, upper=True)
    W = weight.double().clone()
    panel = 4 if pattern.kind == "2:4" else max(_PANEL, pattern.cols)
    for start in range(0, K, panel):
        here = slice(start, min(start + panel, K))
        keep = _chosen(W[:, here] / U.diagonal()[here], pattern, sparsity)
        for j in range(here.start, here.stop):
            error = W[:, j] * ~keep[:, j - start] / U[j, j]
            W[:, j:] -= error[:, None] * U[j, j:]
        W[:, here] *= keep
    return W.to(weight.dtype)


def _chosen(scaled: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """Which weights of a panel stay: bool, of its shape."""
    if pattern.kind == "2:4":
        return two_of_four(scaled.square())
    sums = block_sums(scaled.square(), pattern)
    return expand(keep_mask(sums, sparsity=sparsity), pattern)
