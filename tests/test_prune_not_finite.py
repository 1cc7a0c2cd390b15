"""Weights and activations that are not finite: which layer or parameter is named."""

import copy
from pathlib import Path

import pytest

pytest.importorskip("timm")
import torch
from torch import Tensor, nn

from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk, walk
from lpvit_edge.models import load_model
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, prune
from lpvit_edge.sensitivity import gather_moments

HUGE = torch.finfo(torch.float32).max  # a weight that is finite; what it makes is not
Subject = tuple[nn.Module, Walk, Tensor]


@pytest.fixture(scope="module")
def subject(tiny_project: Path) -> Subject:
    """A small ViT, and noise for images."""
    model = load_model(str(tiny_project / "model.toml")).module
    images = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return model, walk(model, image_size=32), images


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks.0.mlp.fc1.weight", torch.nan),
        ("blocks.1.attn.proj.bias", torch.inf),
        ("blocks.1.norm2.weight", torch.nan),
        ("head.weight", -torch.inf),
    ],
)
def test_weights_that_are_not_finite_are_named_and_not_the_layer_behind_them(
    subject: Subject, name: str, value: float
) -> None:
    model, walked, images = subject
    broken = copy.deepcopy(model)
    weight = broken.get_parameter(name)
    with torch.no_grad():
        weight.view(-1)[1] = value
    said = rf"^{name}: 1 of its {weight.numel()} values is NaN or Inf; take"
    with pytest.raises(PruningError, match=said):
        gather_moments(broken, walked, images[:8], None, patterns=())
    with pytest.raises(PruningError, match=said):
        next(prune(broken, walked, {}, images))


def test_of_many_weights_that_are_not_finite_the_first_is_named_and_the_others_counted(
    subject: Subject,
) -> None:
    model, walked, images = subject
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in broken.get_submodule("blocks.1").parameters():
            parameter.fill_(torch.nan)
    said = r"^blocks.1.norm1.weight: 64 of its 64 values are NaN or Inf \(it is the first of 12 "
    with pytest.raises(PruningError, match=said):
        gather_moments(broken, walked, images[:8], None, patterns=())


def with_huge(model: nn.Module, name: str) -> nn.Module:
    """A copy in which the first values of a parameter are so large that what follows overflows."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_parameter(name)[0] = HUGE
    return broken


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ("blocks.1.norm2.weight", r"blocks.1.mlp.fc1: its inputs hold NaN or Inf"),
        ("head.weight", r"blocks.1.mlp.fc2: the loss gradient at its output"),
    ],
)
def test_what_overflows_in_the_pass_names_the_layer_it_comes_from(
    subject: Subject, parameter: str, said: str
) -> None:
    model, walked, images = subject
    with pytest.raises(PruningError, match=said):
        gather_moments(with_huge(model, parameter), walked, images[:8], None, patterns=())


def test_nan_in_the_activations_names_the_layer(
    subject: Subject,
) -> None:
    model, walked, images = subject
    broken = with_huge(model, "blocks.1.norm1.weight")
    form = Form(pattern=parse_pattern("64x1"), sparsity=0.5)
    forms = {shape.name: form for shape in walked.layers}
    with pytest.raises(PruningError, match=r"blocks.1.attn.qkv: its inputs hold NaN"):
        list(prune(broken, walked, forms, images))
