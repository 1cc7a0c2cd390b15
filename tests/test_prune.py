import copy
from pathlib import Path

import pytest

pytest.importorskip("timm")
import torch
from torch import nn

from lpvit_edge.errors import PruningError
from lpvit_edge.job import prepare_without_images
from lpvit_edge.layers import Walk, walk
from lpvit_edge.models import load_model
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, Settings, prune
from lpvit_edge.prune_refusals import refuse_useless_patterns
from lpvit_edge.records import PrunedLayer
from lpvit_edge.sensitivity import gather_moments, layer_curves, output_fisher, taylor_scores


@pytest.fixture(scope="module")
def subject(tiny_project: Path) -> tuple[nn.Module, Walk, torch.Tensor]:
    """A small ViT and structured images, so that its Hessians are not isotropic."""
    model = load_model(str(tiny_project / "model.toml")).module
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 3, 32, 32, generator=generator)
    images = torch.einsum("nb,bchw->nchw", torch.randn(96, 6, generator=generator), basis)
    images += 0.3 * torch.randn(images.shape, generator=generator)
    return model, walk(model, image_size=32), images


def run(
    subject: tuple[nn.Module, Walk, torch.Tensor],
    pattern: str,
    sparsity: float,
    settings: Settings | None = None,
) -> tuple[list[PrunedLayer], nn.Module]:
    model, walked, images = subject
    form = Form(pattern=parse_pattern(pattern), sparsity=sparsity)
    forms = {layer.name: form for layer in walked.layers}
    log, pruned = [], model
    for layer, so_far in prune(model, walked, forms, images, settings=settings):
        log.append(layer)
        pruned = so_far
    return log, pruned


def output_error(model: nn.Module, pruned: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        reference = model(images)
        return float((pruned(images) - reference).square().sum() / reference.square().sum())


@pytest.mark.parametrize("pattern", ["64x1", "16x4", "32x32"])
def test_every_layer_gets_the_sparsity_asked_for_in_whole_blocks(
    subject: tuple[nn.Module, Walk, torch.Tensor], pattern: str
) -> None:
    log, pruned = run(subject, pattern, 0.5)
    assert [layer.layer for layer in log] == [shape.name for shape in subject[1].layers]
    assert all(layer.sparsity == pytest.approx(0.5, abs=0.01) for layer in log)
    form = parse_pattern(pattern)
    for layer in log:
        W = pruned.get_parameter(f"{layer.layer}.weight")
        blocks = W.reshape(len(W) // form.rows, form.rows, -1, form.cols).abs().amax((1, 3))
        assert float((blocks == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_the_given_model_is_left_as_it_was(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    before = {k: v.clone() for k, v in subject[0].state_dict().items()}
    run(subject, "64x1", 0.5)
    assert all(torch.equal(before[k], v) for k, v in subject[0].state_dict().items())


def test_repair_keeps_far_more_of_the_output_than_masking(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, _, images = subject
    repaired = output_error(model, run(subject, "64x1", 0.5)[1], images)
    masked = output_error(
        model,
        run(subject, "64x1", 0.5, Settings(selection="magnitude", repair=False))[1],
        images,
    )
    assert repaired < masked / 4


def test_a_layer_left_dense_after_a_pruned_one_corrects_its_error(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    first = walked.layers[0].name
    forms = {first: Form(pattern=parse_pattern("64x1"), sparsity=0.5)}
    log = [layer for layer, _ in prune(model, walked, forms, images)]
    assert [layer.layer for layer in log] == [shape.name for shape in walked.layers]
    only = [
        layer for layer, _ in prune(model, walked, forms, images, settings=Settings(repair=False))
    ]
    assert [layer.layer for layer in only] == [first]


def test_too_few_images_say_how_many_would_do(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    with pytest.raises(PruningError, match=r"fc2: 2 .* 34 tokens, fewer than its 256 .* least 16"):
        next(prune(model, walked, {}, images[:2]))


def test_images_all_alike_are_refused(subject: tuple[nn.Module, Walk, torch.Tensor]) -> None:
    model, walked, images = subject
    with pytest.raises(PruningError, match="all 40 calibration images are alike"):
        next(prune(model, walked, {}, images[:1].expand(40, -1, -1, -1)))


def test_a_pattern_that_does_not_divide_names_the_layer_and_the_way_out(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    forms = {"blocks.0.attn.qkv": Form(pattern=parse_pattern("48x5"), sparsity=0.5)}
    with pytest.raises(PruningError, match=r"qkv: 48x5 does not divide its weight \(192 x 64\)"):
        next(prune(model, walked, forms, images))


def test_a_pattern_that_divides_no_layer_is_refused_with_what_would_fit(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    _, walked, _ = subject
    refuse_useless_patterns(walked.layers, ("64x1", "2:4", "192x64"))  # the last fits qkv only
    with pytest.raises(
        PruningError,
        match=r"pattern 48x5 divides none of the 8 .*192 x 64, 64 x 64, 256 x 64.*such as 64x16",
    ):
        refuse_useless_patterns(walked.layers, ("64x1", "48x5"))


@pytest.mark.parametrize("patterns", [("64x1", "48x5"), ("96x7",)])
def test_a_run_with_a_useless_pattern_ends_before_anything_is_measured(
    tiny_project: Path, tmp_path: Path, patterns: tuple[str, ...]
) -> None:
    loaded = load_model(str(tiny_project / "model.toml"))
    with pytest.raises(PruningError, match=f"pattern {patterns[-1]} divides none"):
        prepare_without_images(loaded, tmp_path, engine="openvino", threads=1, patterns=patterns)


def test_a_hessian_that_has_no_cholesky_factor_names_the_layer_and_the_remedy(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.get_parameter("blocks.1.norm2.weight")[5] = 0.0
        silent.get_parameter("blocks.1.norm2.bias")[5] = 0.0
    name = "blocks.1.mlp.fc1"
    forms = {name: Form(pattern=parse_pattern("64x1"), sparsity=0.5)}
    with pytest.raises(PruningError, match=rf"^{name}: .*not positive definite; .*larger damping"):
        list(prune(silent, walked, forms, images, settings=Settings(damping=0.0)))
    assert len(list(prune(silent, walked, forms, images))) > 0  # the default damping bears it


def test_outputs_that_count_more_keep_more_of_their_blocks(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    name = "blocks.0.mlp.fc1"
    forms = {name: Form(pattern=parse_pattern("16x1"), sparsity=0.5)}
    weights = torch.ones(256)
    weights[:64] = 100.0
    *_, (_, plain) = prune(model, walked, forms, images)
    *_, (_, weighted) = prune(model, walked, forms, images, row_weights={name: weights})
    kept = [
        float((pruned.get_parameter(f"{name}.weight")[:64] != 0).float().mean())
        for pruned in (plain, weighted)
    ]
    assert kept[1] > kept[0] + 0.2
    with pytest.raises(PruningError, match="leave out permute"):
        next(
            prune(
                model,
                walked,
                forms,
                images,
                row_weights={name: weights},
                settings=Settings(permute=True),
            )
        )


def test_the_output_fisher_is_the_mean_square_of_each_outputs_gradient(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    name, targets = "blocks.1.mlp.fc2", torch.arange(6) % 3
    fisher = output_fisher(gather_moments(model, walked, images[:6], targets, patterns=()))[name]
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, __: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        seen.append(y)

    handle = model.get_submodule(name).register_forward_hook(keep)
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(model(images[:6]), targets, reduction="sum")
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, seen)
    torch.testing.assert_close(fisher, gradient.square().mean((0, 1)))


def test_the_taylor_score_is_the_loss_change_of_masking_a_block_to_second_order(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    """Against gradients taken one image at a time."""
    model, walked, images = subject
    pattern = parse_pattern("16x16")
    targets = torch.arange(12) % 3
    moments = gather_moments(model, walked, images[:12], targets, patterns=(pattern,), batch=5)
    name = "blocks.1.mlp.fc1"
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    p = []
    for image, target in zip(images[:12], targets, strict=True):
        loss = nn.functional.cross_entropy(model(image[None]), target[None])
        (gradient,) = torch.autograd.grad(loss, [layer.weight])
        product = gradient * layer.weight.detach()
        p.append(product.reshape(16, 16, 4, 16).sum((1, 3)))
    stacked = torch.stack(p)
    expected = stacked.mean(0).square() + stacked.square().mean(0) / 2
    found = taylor_scores(moments[name], pattern, images=12)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)


def test_curves_start_at_zero_and_never_fall(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    patterns = (parse_pattern("64x1"), parse_pattern("48x48"))
    moments = gather_moments(model, walked, images, None, patterns=patterns)
    shape = walked.layers[0]
    layer = model.get_submodule(shape.name)
    assert isinstance(layer, nn.Linear)
    curves = list(layer_curves(shape, layer, moments[shape.name], images=len(images)))
    assert [(c.pattern, c.criterion) for c in curves] == [("64x1", "taylor"), ("64x1", "hessian")]
    for curve in curves:
        assert curve.distortion[0] == 0.0
        assert list(curve.distortion) == sorted(curve.distortion)
        assert curve.distortion[-1] > 0.0
