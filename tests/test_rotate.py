"""Other bases of the residual streams: the same answers, and blocks that cost less."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("timm")
import timm
import torch
from torch import nn

from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk, walk
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, prune
from lpvit_edge.rotate import rotated, rotation
from lpvit_edge.streams import find_streams

PATTERN = parse_pattern("16x16")


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> tuple[nn.Module, Walk]:
    """A small random Vision Transformer."""
    return small(name, {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4} | more)


def swin(name: str = "swin_tiny_patch4_window7_224", **more: Any) -> tuple[nn.Module, Walk]:
    """A small random Swin of two stages."""
    shape = {"patch_size": 2, "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)}
    return small(name, {"window_size": 4, **shape} | more)


def small(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, Walk]:
    """A random model whose norms have gains and offsets of their own."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, img_size=32, **arguments).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model, walk(model, image_size=32)


def pictures(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 3, 32, 32, generator=generator)
    return torch.einsum("nb,bchw->nchw", torch.randn(count, 6, generator=generator), basis)


def answers(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(images)
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def moved(model: nn.Module, turned: nn.Module, layer: str) -> float:
    before, after = (m.get_parameter(f"{layer}.weight") for m in (model, turned))
    return float((before - after).detach().abs().max())


class PlainEmbedding(nn.Module):
    """A patch embedding without a norm behind it."""

    def __init__(self, img_size: int, patch_size: int, embed_dim: int, **_: Any) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size,) * 2
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.proj(images).permute(0, 2, 3, 1)
        return tokens


def test_the_rotation_keeps_lengths_and_the_mean_and_gathers_what_is_strong() -> None:
    torch.manual_seed(0)
    strong = torch.randn(64, 7, dtype=torch.float64)
    Q = rotation(strong @ strong.T, group=16)
    eye = torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(Q @ Q.T, eye)
    torch.testing.assert_close(Q @ torch.ones_like(eye[0]), torch.ones_like(eye[0]))
    centred = strong - strong.mean(0)
    energy = (Q @ centred).square().reshape(4, 16, 7).sum((1, 2))
    assert float(energy[0]) == pytest.approx(float(centred.square().sum()))
    assert float(energy[1:].max()) < 1e-20


@pytest.mark.parametrize("group", [1, 4, 12])
def test_groups_may_be_of_any_size_that_divides_the_channels(group: int) -> None:
    Q = rotation(torch.diag(torch.arange(12.0, dtype=torch.float64)), group=group)
    torch.testing.assert_close(Q @ Q.T, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(Q.sum(1), torch.ones(12, dtype=torch.float64))


def test_readers_without_a_bias_may_ignore_most_of_what_a_norm_gives() -> None:
    model, walked = vit(qkv_bias=False)
    with torch.no_grad():
        model.get_parameter("blocks.0.attn.qkv.weight")[:, 8:] = 0.0
        model.get_parameter("blocks.1.attn.qkv.weight").zero_()
    images = pictures(8)
    assert_same(answers(rotated(model, walked, images), images), answers(model, images))


def test_the_signs_that_a_solver_gives_its_eigenvectors_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    factor = torch.randn(32, 32, dtype=torch.float64)
    C = factor @ factor.T
    expected = rotation(C, group=16)
    eigh = torch.linalg.eigh

    def negated(matrix: torch.Tensor) -> Any:
        values, vectors = eigh(matrix)
        return type(eigh(matrix))((values, -vectors))

    monkeypatch.setattr("torch.linalg.eigh", negated)
    torch.testing.assert_close(rotation(C, group=16), expected)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "init_values": 0.3}),
        ("vit_tiny_patch16_224", {"qkv_bias": False, "reg_tokens": 2}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_a_rotated_model_gives_the_same_answers_from_other_weights(
    name: str, more: dict[str, Any]
) -> None:
    model, walked = vit(name, **more)
    images = pictures(8)
    turned = rotated(model, walked, images)
    assert_same(answers(turned, images), answers(model, images))
    for layer in walked.layers:
        assert moved(model, turned, layer.name) > 0.01, layer.name


def test_a_swin_has_a_stream_for_each_stage_but_the_one_that_a_norm_opens() -> None:
    model, walked = swin()
    images = pictures(8)
    turned = rotated(model, walked, images)
    assert_same(answers(turned, images), answers(model, images))
    for layer in walked.layers:
        assert (moved(model, turned, layer.name) > 0.01) != layer.name.startswith("layers.0.")
    first, second = find_streams(*swin(embed_layer=PlainEmbedding))
    assert (first.opening, first.width) == ("patch_embed.proj", 32)
    assert first.readers[-1] == ("layers.1.downsample.norm", ("layers.1.downsample.reduction",))
    assert (second.opening, second.width) == ("layers.1.downsample.reduction", 64)
    model, walked = swin(embed_layer=PlainEmbedding)
    turned = rotated(model, walked, images)
    assert_same(answers(turned, images), answers(model, images))
    assert moved(model, turned, "layers.0.blocks.0.attn.qkv") > 0.01


def test_blocks_lose_far_less_where_the_stream_has_few_directions() -> None:
    model, walked = vit()
    images = pictures(64)
    few = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.get_parameter("pos_embed").zero_()
        for name, parameter in model.named_parameters():
            if name.endswith((".proj.weight", ".fc2.weight")):
                parameter.copy_((few @ parameter.flatten(1)[:6]).view_as(parameter))
    forms = {layer.name: Form(pattern=PATTERN, sparsity=0.5) for layer in walked.layers}
    turned = rotated(model, walked, images)
    lost = []
    for dense in (model, turned):
        *_, (_, pruned) = prune(dense, walked, forms, images)
        lost.append(float((answers(pruned, images) - answers(model, images)).square().sum()))
    assert lost[1] < lost[0] / 4


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (
            lambda: swin(
                "swinv2_tiny_window8_256", window_size=2, depths=(1, 1, 1), num_heads=(1, 2, 4)
            ),
            r"SwinTransformerV2 is not built .*layers.2.downsample.norm gives 128 channels",
        ),
        (lambda: vit("vit_base_patch16_clip_224"), r"a LayerNorm opens .* VisionTransformer"),
        (lambda: vit("vit_tiny_patch16_224", class_token=False, global_pool="map"), r"differently"),
    ],
)
def test_a_model_that_is_built_otherwise_is_refused_in_words(
    made: Callable[[], tuple[nn.Module, Walk]], reason: str
) -> None:
    model, walked = made()
    with pytest.raises(PruningError, match=reason):
        rotated(model, walked, pictures(4))


def test_what_a_block_lacks_is_named() -> None:
    model, walked = vit()
    del model.get_submodule("blocks.1").norm2
    with pytest.raises(PruningError, match=r"not built like .*no attribute `norm2`"):
        rotated(model, walked, pictures(2))
    model, walked = vit()
    model.norm = nn.Identity()
    with pytest.raises(PruningError, match=r"fc_norm|`bias`"):
        rotated(model, walked, pictures(2))


def test_a_layer_of_another_width_than_the_stream_is_named() -> None:
    model, walked = vit()
    model.get_submodule("patch_embed").proj = nn.Conv2d(3, 32, kernel_size=8, stride=8)
    with pytest.raises(PruningError, match=r"patch_embed.proj gives 32 channels, not 64"):
        find_streams(model, walked)
    model, walked = vit()
    model.get_submodule("blocks.1").norm2 = nn.LayerNorm(96)
    model.get_submodule("blocks.1.mlp").fc1 = nn.Linear(96, 256)
    with pytest.raises(PruningError, match=r"blocks.1.norm2 gives 96 channels and .*\[96\]"):
        find_streams(model, walked)


def test_a_norm_that_gives_nothing_has_no_say_in_the_rotation() -> None:
    model, walked = vit()
    with torch.no_grad():
        for parameter in model.get_submodule("blocks.1.norm1").parameters():
            parameter.zero_()
    images = pictures(8)
    turned = rotated(model, walked, images)
    assert_same(answers(turned, images), answers(model, images))


def test_a_norm_that_gives_more_has_no_greater_say_in_the_rotation() -> None:
    model, walked = vit()
    images = pictures(8)
    expected = rotated(model, walked, images).get_parameter("pos_embed")
    block = model.get_submodule("blocks.1")
    with torch.no_grad():
        for name in ("norm1.weight", "norm1.bias"):
            block.get_parameter(name).mul_(128.0)
        block.get_parameter("attn.qkv.weight").div_(128.0)
    assert torch.equal(rotated(model, walked, images).get_parameter("pos_embed"), expected)


def test_a_stream_that_holds_nan_is_named() -> None:
    model, walked = vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.proj.bias")[0] = torch.finfo(torch.float32).max
    with pytest.raises(PruningError, match=r"^blocks.1.norm2: .* NaN or infinity; check"):
        rotated(model, walked, pictures(2))
    with torch.no_grad():
        model.get_parameter("blocks.0.norm1.weight")[0] = torch.nan
    with pytest.raises(PruningError, match=r"^blocks.0.norm1.weight: 1 of its 64 values is NaN"):
        rotated(model, walked, pictures(2))


def test_a_parameter_of_the_model_that_is_no_token_is_left_alone() -> None:
    model, walked = vit()
    model.register_parameter("temperature", nn.Parameter(torch.tensor(2.0)))
    turned = rotated(model, walked, pictures(4))
    assert turned.get_parameter("temperature").item() == 2.0


def test_answers_that_could_show_nothing_are_refused() -> None:
    model, walked = vit()
    with torch.no_grad():
        for parameter in model.get_submodule("head").parameters():
            parameter.zero_()
    with pytest.raises(PruningError, match="answers nothing but 0 to the calibration images"):
        rotated(model, walked, pictures(4))


def test_all_processes_go_by_what_the_first_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_main(found: torch.Tensor) -> torch.Tensor:
        return found if found.ndim == 2 else torch.tensor([1.0, 1.0])  # Q, or what the answers do

    monkeypatch.setattr("lpvit_edge.rotate.from_main", from_main)
    with pytest.raises(PruningError, match=r"answers 1.0e\+00 differently"):
        rotated(*vit(), pictures(4))


def test_more_processes_than_batches_are_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    model, walked = vit()
    expected = answers(rotated(model, walked, pictures(4)), pictures(4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")  # the last of 2 processes has the only batch
    for name in ("add_up", "from_main"):
        monkeypatch.setattr(f"lpvit_edge.rotate.{name}", lambda *found: found[0])
    assert_same(answers(rotated(model, walked, pictures(4)), pictures(4)), expected)
    monkeypatch.setenv("RANK", "0")
    rotated(model, walked, pictures(4))


@pytest.mark.parametrize("strength", [0.5, 5e-5])
def test_what_else_reads_the_stream_is_found_by_the_answers(strength: float) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.linspace(1 - strength, 1 + strength, x.shape[-1])

    model, walked = vit()
    model.norm_pre = Scaled()
    with pytest.raises(PruningError, match=r"answers .* differently with its residual streams"):
        rotated(model, walked, pictures(8))
