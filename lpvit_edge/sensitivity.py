"""How much the model's output suffers when a layer is pruned, over the whole sparsity range.

Two criteria, both from one pass over the calibration images. "hessian" is in units of the loss;
"taylor" adds a squared change of the loss to one, as LPViT does, so its numbers only compare.

"taylor": masking block b changes the loss of image n by about -p_nb + p_nb^2 / 2 with p_nb = sum of
g_n * W over the block, where g_n is the gradient of that image's own loss: the empirical Fisher per
sample, not the outer product of the averaged gradient, which is close to zero for a trained model.
The score of a block is (E_n p_nb)^2 + E_n[p_nb^2] / 2, its curve the running sum over blocks in
rising order. It assumes that nothing is repaired.

"hessian": T tr(G dW A dW^T) / 2 with A = E[x x^T] and the diagonal of G = E[g g^T], g the loss
gradient at the layer's output, T the tokens of an image, evaluated along the group-OBS elimination
of lpvit_edge.repair, that is after repair. Per layer one elimination gives the curve at every
sparsity. A curve in 2:4 has one point, 0.5.

What is taken from where (docs/method.md says which numbers were held against the papers' text):

* LPViT (Xu et al. 2024, arXiv 2407.02068), its section on the second-order Taylor approximation:
  blocks as the unit, a distortion curve for each layer, one objective for all layers. Its power
  term is not inherited: in the public code it multiplies the pruned fraction, so that minimizing
  it prunes less; here energy is measured and is a constraint of the allocation.
* OBS (Hassibi & Stork 1993, eq. 5): cost and update of removing one weight.
* OBC (Frantar & Alistarh 2022, arXiv 2208.11580): the layer-wise problem (eq. 2), OBS on it
  (eq. 3), the inverse Hessian after a removal (eq. 4), and its section 4 for groups of weights.
* SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): the weights on a mask in closed form
  (eq. 2), and the column sweep in 2:4 (eqs. 3 to 5, algorithm 1).
* SPDY (Frantar & Alistarh 2022, arXiv 2201.13096), its section on the problem and the dynamic
  programme: errors of layers add up, and a search over a table of options for each layer replaces
  one threshold; here the table is solved exactly.
* K-FAC (Martens & Grosse 2015, arXiv 1503.05671, section 3, eq. 1): the Fisher of a layer as a
  Kronecker product of A and G.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lpvit_edge.distributed import add_up, share
from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk, hooks
from lpvit_edge.pattern import TWO_FOUR_SPARSITY, Pattern
from lpvit_edge.progress import track
from lpvit_edge.prune_refusals import refuse_broken_weights
from lpvit_edge.records import LayerShape, SensitivityCurve
from lpvit_edge.repair import (
    DAMPING,
    Statistics,
    about_layer,
    normal_equations,
    refuse_unfit,
    removal_costs,
)
from lpvit_edge.solve import block_sums
from lpvit_edge.statistics import with_bias
from lpvit_edge.two_four import two_of_four

GRID = tuple(round(0.05 * step, 2) for step in range(20))  # 0.0, 0.05 ... 0.95


class Moments(msgspec.Struct, kw_only=True):
    """What one pass gathers about one layer."""

    A: Tensor  # (K, K) sum of x x^T over tokens, with the constant 1 where there is a bias
    G: Tensor  # (N,) sum of squared output gradients over tokens
    p: dict[Pattern, Tensor]  # (N / rows, K / cols) sum of p_nb over images
    p_squared: dict[Pattern, Tensor]
    tokens: int = 0


def gather_moments(
    model: nn.Module,
    walk: Walk,
    images: Tensor,
    targets: Tensor | None,
    *,
    patterns: tuple[Pattern, ...],
    batch: int = 16,
) -> dict[str, Moments]:
    """Run every image forward and backward once.

    images (n, 3, S, S), on the model's device as the targets; targets (n,) classes, or None: then
    the model's own answers are taken.
    Raises PruningError naming the parameter that holds NaN or Inf, or else the layer at which they
    appear.
    """
    refuse_broken_weights(model)
    layers = {layer.name: model.get_submodule(layer.name) for layer in walk.layers}
    moments = {name: _empty(layer, patterns) for name, layer in layers.items()}
    starts = share(range(0, len(images), batch))
    for start in track(starts, what="sensitivity: gradients", total=len(starts)):
        part = images[start : start + batch]
        seen = _forward_backward(
            model, layers, part, None if targets is None else targets[start : start + batch]
        )
        for name, (x, g) in seen.items():
            _add(moments[name], layers[name], x, g)
    for found in moments.values():
        _add_up(found)
    _refuse_not_finite(moments)
    return moments


def _refuse_not_finite(moments: Mapping[str, Moments]) -> None:
    """Name the layer at which NaN or Inf appears first: forwards, or else on the way back."""
    for name, found in moments.items():
        with about_layer(name):
            refuse_unfit(found.A)
    for name, found in reversed(tuple(moments.items())):
        if not bool(torch.isfinite(found.G).all()):
            raise PruningError(
                f"{name}: the loss gradient at its output holds NaN or Inf; check the weights "
                "behind it"
            )


def _add_up(moments: Moments) -> None:
    """The moments over the images of all processes."""
    tokens = torch.tensor([moments.tokens])
    add_up(moments.A, moments.G, *moments.p.values(), *moments.p_squared.values(), tokens)
    moments.tokens = int(tokens)


def _empty(layer: nn.Module, patterns: tuple[Pattern, ...]) -> Moments:
    assert isinstance(layer, nn.Linear)
    N, K = layer.weight.shape
    size = K + (layer.bias is not None)
    fitting = [pattern for pattern in patterns if pattern.fits(N, K)]
    zeros = partial(torch.zeros, device=layer.weight.device)
    p, p_squared = (
        {pattern: zeros(N // pattern.rows, K // pattern.cols) for pattern in fitting}
        for _ in range(2)
    )
    return Moments(A=zeros(size, size), G=zeros(N), p=p, p_squared=p_squared)


def _forward_backward(
    model: nn.Module, layers: Mapping[str, nn.Module], images: Tensor, targets: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each layer's input (n, T, K) and the gradient (n, T, N) of each image's own loss."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            if name in inputs:
                raise PruningError(f"{name} runs several times per image; it cannot be pruned yet")
            inputs[name], outputs[name] = args[0].detach(), result

        return layers[name].register_forward_hook(hook)

    with hooks(keep(name) for name in layers), torch.enable_grad():
        logits = model(images)
        classes = logits.detach().argmax(1) if targets is None else targets
        loss = functional.cross_entropy(logits, classes, reduction="sum")
        gradients = torch.autograd.grad(loss, [outputs[name] for name in layers])
    n = len(images)
    return {
        name: (
            inputs[name].reshape(n, -1, inputs[name].shape[-1]),
            gradient.reshape(n, -1, gradient.shape[-1]),
        )
        for name, gradient in zip(layers, gradients, strict=True)
    }


def _add(moments: Moments, layer: nn.Module, x: Tensor, g: Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    flat = x.reshape(-1, x.shape[-1])
    if layer.bias is not None:
        flat = torch.cat([flat, flat.new_ones(len(flat), 1)], 1)
    moments.A += flat.T @ flat
    moments.G += g.square().sum((0, 1))
    moments.tokens += len(flat)
    weight = layer.weight.detach()
    for x_n, g_n in zip(x, g, strict=True):
        product = (g_n.T @ x_n) * weight
        for pattern, total in moments.p.items():
            p = block_sums(product, pattern)
            total += p
            moments.p_squared[pattern] += p.square()


def taylor_scores(moments: Moments, pattern: Pattern, *, images: int) -> Tensor:
    """(E_n p)^2 + E_n[p^2] / 2 for each block: (N / rows, K / cols)."""
    mean = moments.p[pattern] / images
    return mean.square() + moments.p_squared[pattern] / images / 2


def output_fisher(moments: Mapping[str, Moments]) -> dict[str, Tensor]:
    """diag E[g g^T] (N,) of every layer: the row weights that choose blocks as the curves do."""
    return {name: found.G / found.tokens for name, found in moments.items()}


def hessian_costs(
    moments: Moments, layer: nn.Linear, pattern: Pattern, *, damping: float, steps: int
) -> Tensor:
    """Removal costs weighted with the output Fisher, per image and in units of the loss."""
    A = (moments.A / moments.tokens).double()
    W = with_bias(layer).to(A.dtype)
    statistics = Statistics(A=A, B=W @ A, target_energy=1.0, tokens=moments.tokens)
    system = normal_equations(W, statistics, damping=damping, free=layer.in_features)
    fisher = moments.G / moments.tokens
    return removal_costs(W, system, pattern, row_weights=fisher.to(A.dtype), steps=steps) / 2


def curve(
    costs: Tensor, *, layer: LayerShape, pattern: Pattern, criterion: str, scale: float
) -> SensitivityCurve:
    """Running sum of the rising block costs, read at GRID; for 2:4 at its one sparsity."""
    if pattern.kind == "2:4":
        grid: tuple[float, ...] = (0.0, TWO_FOUR_SPARSITY)
        distortion: tuple[float, ...] = (0.0, scale * float(costs[~two_of_four(costs)].sum()))
    else:
        grid = GRID
        rising = torch.cat([costs.new_zeros(1), costs.flatten().sort().values.cumsum(0)]) * scale
        distortion = tuple(float(rising[round(s * costs.numel())]) for s in GRID)
    return SensitivityCurve(
        layer=layer.name,
        pattern=str(pattern),
        criterion=criterion,
        sparsity=grid,
        distortion=distortion,
    )


def layer_curves(
    layer: LayerShape,
    module: nn.Linear,
    moments: Moments,
    *,
    images: int,
    damping: float = DAMPING,
    steps: int = 32,
) -> Iterator[SensitivityCurve]:
    """Both curves of one layer for every pattern that fits it."""
    for pattern in moments.p:
        scores = taylor_scores(moments, pattern, images=images)
        yield curve(scores, layer=layer, pattern=pattern, criterion="taylor", scale=1.0)
        with about_layer(layer.name):
            costs = hessian_costs(moments, module, pattern, damping=damping, steps=steps)
        yield curve(
            costs, layer=layer, pattern=pattern, criterion="hessian", scale=float(layer.tokens)
        )
