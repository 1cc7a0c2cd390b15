import copy

import pytest

timm = pytest.importorskip("timm")
import torch  # noqa: E402
from torch import nn  # noqa: E402

from lpvit_edge.layers import walk  # noqa: E402
from lpvit_edge.pattern import parse_pattern  # noqa: E402
from lpvit_edge.permute import find_pairs, grouped, reorder_stage  # noqa: E402
from lpvit_edge.prune import Form, Settings, prune  # noqa: E402
from lpvit_edge.statistics import stage_input  # noqa: E402

Architecture = tuple[str, int, dict[str, object]]
VIT: Architecture = (
    "vit_tiny_patch16_224",
    32,
    {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
)
SWIN: Architecture = (
    "swin_tiny_patch4_window7_224",
    56,
    {"depths": (1, 2, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
)


def build(which: tuple[str, int, dict[str, object]]) -> tuple[nn.Module, int]:
    name, size, arguments = which
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, img_size=size, **arguments).eval()
    return model, size


def reordered(model: nn.Module, size: int, pattern: str) -> tuple[nn.Module, list[str]]:
    found = walk(model, image_size=size)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1))
    form = Form(pattern=parse_pattern(pattern), sparsity=0.5)
    changed, pairs = copy.deepcopy(model), []
    for stage, names in found.stages:
        forms = dict.fromkeys(names, form)
        x = stage_input(changed, stage, images)
        pairs += [p.second for p in reorder_stage((changed,), stage, names, forms, [x])]
    return changed, pairs


@pytest.mark.parametrize("which", [VIT, SWIN], ids=["vit", "swin"])
def test_a_reordered_network_computes_the_same_function(
    which: tuple[str, int, dict[str, object]],
) -> None:
    model, size = build(which)
    changed, pairs = reordered(model, size, "16x8")
    blocks = sum(1 for name, _ in model.named_modules() if name.endswith("mlp.fc2"))
    assert sum(name.endswith("mlp.fc2") for name in pairs) == blocks
    assert sum(name.endswith("attn.proj") for name in pairs) == blocks
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(changed(images), model(images), rtol=1e-4, atol=1e-5)
    moved = changed.state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in model.state_dict().items())


def test_heads_keep_their_channels_and_queries_their_places() -> None:
    model, size = build(VIT)
    changed, _ = reordered(model, size, "16x8")
    before = model.get_parameter("blocks.0.attn.qkv.weight").detach()
    after = changed.get_parameter("blocks.0.attn.qkv.weight").detach()
    assert torch.equal(before[:128], after[:128])
    for head in (slice(128, 160), slice(160, 192)):
        assert not torch.equal(before[head], after[head])
        assert torch.equal(before[head].sort(0).values, after[head].sort(0).values)


class Skipping(nn.Module):
    """The hidden neurons reach the output by a second way, so they must stay in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x).relu()
        result: torch.Tensor = self.fc2(hidden) + hidden
        return result


class Normed(Skipping):
    """Position matters between the layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc2(self.fc1(x).cumsum(-1))
        return result


@pytest.mark.parametrize("kind", [Skipping, Normed])
def test_layers_whose_channels_have_a_place_are_no_pair(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    before = copy.deepcopy(model.state_dict())
    assert find_pairs(model, "", ("fc1", "fc2"), torch.randn(2, 5, 16)) == ()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rows_that_need_the_same_columns_come_together() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randperm(32, generator=generator) % 4
    saliency = torch.rand(32, 40, generator=generator) * 0.01
    for row, kind in enumerate(kinds.tolist()):
        saliency[row, 10 * kind : 10 * kind + 10] += 1.0
    order = grouped(saliency, size=8, keep=0.25)
    assert sorted(order.tolist()) == list(range(32))
    assert all(len(set(kinds[part].tolist())) == 1 for part in order.reshape(4, 8))


def test_reordering_lets_a_pruned_layer_keep_more_of_its_output() -> None:
    """Neurons of two kinds, mixed: each kind needs its own half of the inputs."""
    model, size = build(VIT)
    fc1 = model.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(fc1, nn.Linear)
    with torch.no_grad():
        fc1.weight[0::2, :32] *= 0.05
        fc1.weight[1::2, 32:] *= 0.05
    found = walk(model, image_size=size)
    images = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(1))
    forms = {"blocks.0.mlp.fc1": Form(pattern=parse_pattern("64x1"), sparsity=0.5)}
    errors = [
        next(prune(model, found, forms, images, settings=Settings(permute=permute)))[0]
        for permute in (True, False)
    ]
    assert errors[0].layer == "blocks.0.mlp.fc1"
    assert errors[0].relative_error < 0.3 * errors[1].relative_error
