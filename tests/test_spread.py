"""Columns change places so that 2:4 takes less."""

import copy

import pytest

pytest.importorskip("timm")
import torch
from torch import nn

from lpvit_edge.layers import walk
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, Settings, prune
from lpvit_edge.spread import spread, two_best
from tests.test_permute import VIT, build, reordered


def kept(saliency: torch.Tensor, order: torch.Tensor) -> float:
    fours = saliency[:, order].reshape(len(saliency), -1, 4)
    return float(fours.topk(2, dim=2).values.sum() / saliency.sum())


def test_two_best_of_four_is_their_sum() -> None:
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two_best(values), values.topk(2, dim=1).values.sum(1))


@pytest.mark.parametrize("columns", [8, 12, 64])
def test_no_column_is_lost_and_more_is_kept(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    saliency = torch.randn(40, columns, generator=generator).square()
    saliency = saliency * (1 + 50 * (torch.arange(columns) < max(4, columns // 4)))
    order = spread(saliency)
    assert sorted(order.tolist()) == list(range(columns))
    assert kept(saliency, order) > kept(saliency, torch.arange(columns)) + 0.05
    assert torch.equal(order, spread(saliency))


def test_large_columns_end_two_to_a_group() -> None:
    large = torch.arange(32) < 16
    order = spread(0.01 + large.float().expand(8, -1))
    assert large[order].reshape(8, 4).sum(1).tolist() == [2] * 8


def test_where_nothing_is_better_the_groups_stay() -> None:
    saliency = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(5, 4)
    order = spread(saliency)
    groups = {frozenset(group) for group in order.reshape(4, 4).tolist()}
    assert groups == {frozenset(range(start, start + 4)) for start in range(0, 16, 4)}


def test_a_network_spread_for_two_four_computes_the_same_function() -> None:
    model, size = build(VIT)
    changed, pairs = reordered(model, size, "2:4")
    assert {name.split(".", 2)[2] for name in pairs} == {"attn.proj", "mlp.fc2"}
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    weight = "blocks.0.mlp.fc2.weight"
    assert not torch.equal(model.get_parameter(weight), changed.get_parameter(weight))
    with torch.no_grad():
        torch.testing.assert_close(changed(x), model(x), rtol=1e-4, atol=1e-5)


def test_spreading_lets_a_layer_in_two_four_keep_more_of_its_output() -> None:
    model, size = build(VIT)
    model = copy.deepcopy(model)
    fc2 = model.get_submodule("blocks.0.mlp.fc2")
    assert isinstance(fc2, nn.Linear)
    with torch.no_grad():
        fc2.weight[:, torch.arange(256) % 8 < 4] *= 0.05  # every other group of four
    images = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(1))
    forms = {"blocks.0.mlp.fc2": Form(pattern=parse_pattern("2:4"), sparsity=0.5)}
    walked = walk(model, image_size=size)
    errors = [
        next(prune(model, walked, forms, images, settings=Settings(permute=permute)))[0]
        for permute in (True, False)
    ]
    assert errors[0].layer == "blocks.0.mlp.fc2"
    assert errors[0].relative_error < 0.3 * errors[1].relative_error
