"""Another basis of the residual stream: the same answers, and coarse blocks that cost less."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm")
import timm
import torch
from torch import nn

from lpvit_edge import files, partial, steps
from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk, walk
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, prune
from lpvit_edge.prune_step import prune as prune_step
from lpvit_edge.rotate import rotated, rotation
from tests.test_finetune import allocation_for
from tests.test_optimize import make_job

COARSE = Form(pattern=parse_pattern("16x16"), sparsity=0.5)
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}


def vit(name: str = "vit_tiny_patch16_224", **more: Any) -> tuple[nn.Module, Walk]:
    """A small random model whose norms have gains and offsets of their own."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **SMALL, **more).eval()
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


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "init_values": 0.3}),
        ("deit_tiny_distilled_patch16_224", {}),
    ],
)
def test_a_rotated_model_gives_the_same_answers_from_other_weights(
    name: str, more: dict[str, Any]
) -> None:
    model, walked = vit(name, **more)
    images = pictures(8)
    forms = {layer.name: COARSE for layer in walked.layers}
    turned = rotated(model, walked, [images], forms)
    expected = answers(model, images)
    torch.testing.assert_close(answers(turned, images), expected, rtol=1e-4, atol=1e-5)
    for layer in walked.layers:
        before, after = (m.state_dict()[f"{layer.name}.weight"] for m in (model, turned))
        assert float((before - after).abs().max()) > 0.01, layer.name


def test_coarse_blocks_lose_far_less_where_attention_writes_few_directions() -> None:
    model, walked = vit()
    images = pictures(64)
    with torch.no_grad():
        for block in model.get_submodule("blocks").children():
            values = block.get_parameter("attn.qkv.weight")[128:]
            values.copy_(30.0 * values[:, :3] @ values[:3])  # 3 directions in each of 4 heads
    forms = {layer.name: COARSE for layer in walked.layers if layer.name.endswith("attn.proj")}
    turned = rotated(model, walked, [images], forms)
    lost = []
    for dense in (model, turned):
        *_, (_, pruned) = prune(dense, walked, forms, images)
        lost.append(float((answers(pruned, images) - answers(model, images)).square().sum()))
    assert lost[1] < lost[0] / 4


def test_a_model_that_is_built_otherwise_is_refused_in_words() -> None:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, embed_dim=32, depths=(2,), num_heads=(2,)
    ).eval()
    with pytest.raises(PruningError, match=r"SwinTransformer is not built like .* leave out"):
        rotated(model, walk(model, image_size=64), [torch.randn(2, 3, 64, 64)], {})


def test_what_a_block_lacks_is_named() -> None:
    model, walked = vit()
    del model.get_submodule("blocks.1").ls2
    with pytest.raises(PruningError, match=r"no attribute `ls2`.*leave out --rotate"):
        rotated(model, walked, [pictures(2)], {})
    model, walked = vit()
    model.norm = nn.Identity()
    with pytest.raises(PruningError, match=r"fc_norm|`bias`"):
        rotated(model, walked, [pictures(2)], {})


def test_an_attention_that_writes_nothing_has_no_say_in_the_rotation() -> None:
    model, walked = vit()
    with torch.no_grad():
        for parameter in model.get_submodule("blocks.1.attn.proj").parameters():
            parameter.zero_()
    images = pictures(8)
    turned = rotated(model, walked, [images], {"blocks.0.attn.proj": COARSE})
    torch.testing.assert_close(
        answers(turned, images), answers(model, images), rtol=1e-4, atol=1e-5
    )


def test_an_attention_that_writes_nan_is_named() -> None:
    model, walked = vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.proj.bias")[0] = torch.finfo(torch.float32).max
    with pytest.raises(PruningError, match=r"^blocks.1.attn.proj: .* NaN or infinity; check"):
        rotated(model, walked, [pictures(2)], {})
    with torch.no_grad():
        model.get_parameter("blocks.0.norm1.weight")[0] = torch.nan
    with pytest.raises(PruningError, match=r"^blocks.0.norm1.weight: 1 of its 64 values is NaN"):
        rotated(model, walked, [pictures(2)], {})


def test_what_else_reads_the_stream_is_found_by_the_answers() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.linspace(0.5, 1.5, x.shape[-1])

    model, walked = vit()
    model.norm_pre = Scaled()
    with pytest.raises(PruningError, match=r"answers .* differently with its residual stream"):
        rotated(model, walked, [pictures(8)], {"blocks.0.attn.proj": COARSE})


def test_an_interrupted_run_goes_on_in_the_basis_it_began_in(
    tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_project, tmp_path)
    allocation = allocation_for(job)
    files.save(allocation, job.path("allocation.json"))
    whole = prune_step(job, allocation, rotate=True)
    assert whole.method.endswith(", rotated")
    expected = steps.pruned_weights(job)
    taken = 0

    def torn(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        for item in partial_keeping(*args, **kwargs):
            yield item
            taken += 1
            if taken == 3:
                raise KeyboardInterrupt

    partial_keeping = partial.keeping
    monkeypatch.setattr(partial, "keeping", torn)
    with pytest.raises(KeyboardInterrupt):
        prune_step(job, allocation, rotate=True)
    monkeypatch.setattr(partial, "keeping", partial_keeping)
    monkeypatch.setattr("lpvit_edge.rotate.rotation", None)  # not chosen again
    prune_step(job, allocation, rotate=True)
    for name, value in steps.pruned_weights(job).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
