"""Take out of a pruned network what it no longer computes: neurons, heads, whole layers.

A channel between two layers (see lpvit_edge.permute.Pair) is dead when the second layer's column
is zero, or when it always has the same value, which then moves into the second layer's bias. Dead
channels go in units that leave every block of both layers whole; a head goes with its queries, keys
and values. A layer whose weight is all zero becomes its bias. The function stays the same.
"""

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lpvit_edge.layers import Walk, example_images
from lpvit_edge.pattern import DENSE, Pattern
from lpvit_edge.permute import Pair, find_pairs
from lpvit_edge.statistics import each_input, stage_input

_TOLERANCE = 1e-4  # of the largest output


class Bias(nn.Module):
    """What a linear layer with an all-zero weight computes: (..., K) -> (..., N)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        self.bias = nn.Buffer(bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:-1], -1)


def shrink(
    model: nn.Module, walk: Walk, patterns: Mapping[str, Pattern], *, image_size: int
) -> tuple[str, ...]:
    """Shrink `model` in place; returns a sentence for each thing that went.

    `patterns` are the layers' patterns, whose blocks must stay whole.
    """
    images = example_images(image_size, batch=2)
    gone: list[str] = []
    for stage, names in walk.stages:
        for pair in _pairs(model, stage, names, images):
            x = stage_input(model, stage, images) if stage else images
            _fold_constants(model.get_submodule(stage), *_layers(model, pair), pair, x)
            gone += _remove_channels(model, stage, pair, patterns, x)
    for shape in walk.layers:
        layer = _linear(model, shape.name)
        if not bool(layer.weight.any()):
            model.set_submodule(shape.name, Bias(layer))
            gone.append(f"{shape.name}: all zero, only its bias is left")
    return tuple(gone)


def _pairs(
    model: nn.Module, stage: str, names: tuple[str, ...], images: Tensor
) -> tuple[Pair, ...]:
    """Pairs of layers, looked for with random weights: zeros would hide what depends on what."""
    probe = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            weight = _linear(probe, name).weight
            noise = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
            weight.copy_(noise)
    x = stage_input(probe, stage, images) if stage else images
    return find_pairs(probe, stage, names, x)


def _fold_constants(
    stage: nn.Module, first: nn.Linear, second: nn.Linear, pair: Pair, x: Tensor
) -> None:
    """Move channels that never change into the second layer's bias."""
    fixed = ~first.weight[-pair.channels :].any(1)
    if second.bias is None or not bool(fixed.any()):
        return
    inputs = next(each_input(stage, second, [x]))
    fixed &= (inputs - inputs[0]).abs().amax(0) <= _TOLERANCE * inputs.abs().max()
    with torch.no_grad():
        second.bias.add_(second.weight[:, fixed] @ inputs[0, fixed])
        second.weight[:, fixed] = 0.0


def _remove_channels(
    model: nn.Module, stage: str, pair: Pair, patterns: Mapping[str, Pattern], x: Tensor
) -> list[str]:
    second = _linear(model, pair.second)
    whole = pair.segment if pair.segment < pair.channels else 1
    a, b = (patterns.get(name, DENSE) for name in (pair.first, pair.second))
    unit = math.lcm(whole, a.rows, 4 if b.kind == "2:4" else b.cols)
    if pair.channels % unit:
        return []
    dead = ~second.weight.any(0).reshape(-1, unit).any(1)
    if bool(dead.all()) or not bool(dead.any()):
        return []  # an all-zero layer is left to its bias as a whole
    keep = (~dead).repeat_interleave(unit).nonzero()[:, 0]
    smaller = copy.deepcopy(model.get_submodule(_parent(pair)))
    if not _cut(smaller, pair, keep):
        return []
    return _swap(model, stage, pair, smaller, x, removed=pair.channels - len(keep))


def _cut(parent: nn.Module, pair: Pair, keep: Tensor) -> bool:
    """Cut the two layers of a parent down to the channels in `keep`; False where it cannot be."""
    head = _parent(pair)
    first_name, second_name = (
        name.removeprefix(head + ".") if head else name for name in (pair.first, pair.second)
    )
    first, second = _linear(parent, first_name), _linear(parent, second_name)
    thirds = first.out_features // pair.channels
    rows = torch.cat([third * pair.channels + keep for third in range(thirds)])
    if pair.segment < pair.channels and not _cut_heads(parent, pair, keep):
        return False
    parent.set_submodule(first_name, _linear_of(first.weight[rows], first.bias, rows))
    columns = _linear_of(second.weight[:, keep], second.bias, None)
    parent.set_submodule(second_name, columns)
    return True


def _cut_heads(parent: nn.Module, pair: Pair, keep: Tensor) -> bool:
    """Tell an attention module how many heads are left; timm's attributes are known."""
    heads = keep[:: pair.segment] // pair.segment
    setattr(parent, "num_heads", len(heads))  # noqa: B010, no Tensor or Module
    if hasattr(parent, "attn_dim"):
        setattr(parent, "attn_dim", len(keep))  # noqa: B010
    table = getattr(parent, "relative_position_bias_table", None)
    if isinstance(table, nn.Parameter):
        parent.relative_position_bias_table = nn.Parameter(table.detach()[:, heads].clone())
    return not isinstance(getattr(parent, "norm", nn.Identity()), nn.LayerNorm)


def _linear_of(weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias if rows is None else bias[rows])
    return layer


def _swap(
    model: nn.Module, stage: str, pair: Pair, smaller: nn.Module, x: Tensor, *, removed: int
) -> list[str]:
    """Put the smaller module in where the stage then still answers the same."""
    module, name = model.get_submodule(stage), _parent(pair)
    with torch.no_grad():
        before = module(x)
        larger = model.get_submodule(name)
        model.set_submodule(name, smaller)
        try:
            after = model.get_submodule(stage)(x)
            same = float((after - before).abs().max()) <= _TOLERANCE * float(before.abs().max())
        except RuntimeError:  # shapes that the module holds in a place we do not know
            same = False
    if not same:
        model.set_submodule(name, larger)
        return []
    if pair.segment < pair.channels:
        return [
            f"{name}: {removed // pair.segment} of {pair.channels // pair.segment} heads removed"
        ]
    return [f"{name}: {removed} of {pair.channels} neurons removed"]


def _parent(pair: Pair) -> str:
    """The innermost module that holds both layers."""
    parts = [
        shared
        for shared, other in zip(pair.first.split("."), pair.second.split("."), strict=False)
        if shared == other
    ]
    return ".".join(parts)


def _layers(model: nn.Module, pair: Pair) -> tuple[nn.Linear, nn.Linear]:
    return _linear(model, pair.first), _linear(model, pair.second)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
