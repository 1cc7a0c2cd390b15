"""Torch-Pruning narrows a ViT and a Swin consistently, and to the MACs asked for."""

from collections.abc import Callable

import pytest

timm = pytest.importorskip("timm")
torch = pytest.importorskip("torch")

from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.pruning import removed_share  # noqa: E402
from benchmarks.pruning_methods import METHODS  # noqa: E402
from benchmarks.pruning_subject import Subject  # noqa: E402
from lpvit_edge.layers import walk  # noqa: E402
from lpvit_edge.pattern import DENSE  # noqa: E402

NARROWED = ("attn.qkv", "mlp.fc1")


def vit() -> nn.Module:
    """A small random transformer of one width."""
    found: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        num_classes=5,
    )
    return found


def swin() -> nn.Module:
    """A small random Swin: shifted windows, position tables that count, patch merging."""
    model: nn.Module = SwinTransformer(
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        num_classes=5,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    return model


def subject_of(model: nn.Module) -> Subject:
    images = torch.randn(24, 3, 32, 32)
    data = (images, torch.arange(24) % 5)
    return Subject("tiny", model.eval(), walk(model, image_size=32), data, data, ())


def test_layers_beside_a_dense_one_give_more() -> None:
    torch.manual_seed(0)
    subject = subject_of(swin())
    merging = [layer for layer in subject.walk.layers if layer.name.endswith("reduction")]
    others = [layer for layer in subject.walk.layers if layer not in merging]
    assert len(merging) == 1
    # Four blocks of 12 C^2 T multiplications, and one merging of 2 C^2 T.
    assert subject.raised(0.5, others) == pytest.approx(0.5 * 50 / 48)
    assert subject.raised(0.5, subject.walk.layers) == 0.5


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
@pytest.mark.parametrize("create", [vit, swin])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_torch_prunings_narrow_model_answers_as_the_one_whose_channels_are_zero(
    create: Callable[[], nn.Module], sparsity: float
) -> None:
    pytest.importorskip("torch_pruning", reason="comes with the extra bench")
    torch.manual_seed(0)
    subject = subject_of(create())
    narrow = METHODS["torch_pruning"].prunes(subject, DENSE, sparsity).model
    assert removed_share(subject, narrow) == pytest.approx(sparsity, abs=0.03)
    dense = subject_of(create())
    dense.module.load_state_dict(subject.module.state_dict())
    with torch.no_grad():
        answers = narrow(subject.images)
        assert not torch.allclose(answers, dense.module(subject.images), atol=1e-3)
        for layer in subject.walk.layers:
            if layer.name.endswith(NARROWED):
                silence(dense.linear(layer.name), subject.linear(layer.name, of=narrow))
        assert torch.allclose(answers, dense.module(subject.images), atol=1e-5)


def silence(layer: nn.Linear, kept: nn.Linear) -> None:
    """Zero the outputs of a layer that a narrower copy of it no longer has."""
    rows = {row.numpy().tobytes() for row in kept.weight}
    gone = [number for number, row in enumerate(layer.weight) if row.numpy().tobytes() not in rows]
    assert len(gone) == layer.out_features - kept.out_features
    layer.weight[gone] = 0.0
    layer.bias[gone] = 0.0
