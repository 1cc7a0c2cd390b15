import pytest

timm = pytest.importorskip("timm")
import torch  # noqa: E402
from torch import nn  # noqa: E402

from lpvit_edge.errors import ModelError  # noqa: E402
from lpvit_edge.layers import walk  # noqa: E402


def small(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **arguments).eval()
    return model


def test_a_vit_is_walked_block_by_block() -> None:
    model = small("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2)
    found = walk(model, image_size=32)
    assert [(s.name, s.tokens, s.in_features, s.out_features) for s in found.layers[:4]] == [
        ("blocks.0.attn.qkv", 17, 192, 576),
        ("blocks.0.attn.proj", 17, 192, 192),
        ("blocks.0.mlp.fc1", 17, 192, 768),
        ("blocks.0.mlp.fc2", 17, 768, 192),
    ]
    assert [name for name, _ in found.stages] == ["blocks.0", "blocks.1"]
    assert [s.activation for s in found.layers[:4]] == ["none", "none", "gelu", "none"]
    assert found.gelu_after["blocks.1.mlp.fc1"] == "blocks.1.mlp.act"


def test_a_distilled_deit_has_one_token_more_and_its_heads_are_left_alone() -> None:
    model = small("deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=2)
    found = walk(model, image_size=32)
    assert {shape.tokens for shape in found.layers} == {18}
    assert not [shape.name for shape in found.layers if "head" in shape.name]


def test_a_swin_is_walked_with_its_patch_merging_and_windows() -> None:
    model = small(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        depths=(1, 1, 1, 1),
        embed_dim=24,
        num_heads=(1, 2, 4, 8),
    )
    found = walk(model, image_size=56)
    by_name = {shape.name: shape for shape in found.layers}
    assert by_name["layers.0.blocks.0.attn.qkv"].tokens == 14 * 14
    assert by_name["layers.1.downsample.reduction"].tokens == 7 * 7
    assert by_name["layers.1.downsample.reduction"].in_features == 96
    assert [name for name, _ in found.stages][:3] == [
        "layers.0.blocks.0",
        "layers.1.downsample",
        "layers.1.blocks.0",
    ]
    assert sum(len(names) for _, names in found.stages) == len(found.layers)


class TwoPaths(nn.Module):
    """No list of blocks, and a linear that never sees the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 32), nn.Linear(48, 32)
        self.table, self.head = nn.Linear(4, 32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).reshape(len(x), -1, 48)
        mixed = self.first(tokens) + self.second(tokens) + self.table(torch.ones(1, 4))
        logits: torch.Tensor = self.head(mixed.mean(1))
        return logits


def test_any_module_with_linears_can_be_walked_and_tables_are_left_out() -> None:
    found = walk(TwoPaths(), image_size=8)
    assert [shape.name for shape in found.layers] == ["first", "second"]
    assert found.stages == (("", ("first", "second")),)


class ListedHead(nn.Module):
    """A classifier inside a Sequential, one GELU for both blocks, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])
        self.act, self.twice = nn.GELU(), nn.Linear(48, 48)
        self.mlp_head = nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).reshape(len(x), -1, 48)
        for block in self.blocks:
            tokens = self.act(block(tokens))
        logits: torch.Tensor = self.mlp_head(self.twice(self.twice(tokens)).mean(1))
        return logits


def test_a_classifier_in_a_list_a_shared_gelu_and_a_layer_run_twice_are_left_alone() -> None:
    found = walk(ListedHead(), image_size=8)
    assert [shape.name for shape in found.layers] == ["blocks.0", "blocks.1"]
    assert found.gelu_after == {}
    assert {shape.activation for shape in found.layers} == {"none"}


def test_a_model_that_returns_no_single_tensor_is_refused() -> None:
    class Two(TwoPaths):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x), None  # type: ignore[return-value]

    with pytest.raises(ModelError, match="Two returns tuple, expected one tensor of logits"):
        walk(Two(), image_size=8)


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(ModelError, match="no prunable linear layer"):
        walk(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), image_size=8)
