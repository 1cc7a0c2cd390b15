"""Every architecture the pruner is for: curves, pruning, export, and the engine's answer."""

from pathlib import Path
from typing import Any

import pytest

timm = pytest.importorskip("timm")
pytest.importorskip("onnx")
pytest.importorskip("openvino")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from lpvit_edge.export import compare_runtimes, export_onnx  # noqa: E402
from lpvit_edge.layers import walk  # noqa: E402
from lpvit_edge.pattern import parse_pattern  # noqa: E402
from lpvit_edge.prune import Form, prune  # noqa: E402
from lpvit_edge.rotate import rotated  # noqa: E402
from lpvit_edge.sensitivity import gather_moments, layer_curves  # noqa: E402

_SMALL: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
}


class Segmenter(nn.Module):
    """A ViT backbone under a decoder: images (n, 3, S, S) -> (n, classes, S, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **_SMALL)
        self.decode = nn.Sequential(nn.Conv2d(64, 5, kernel_size=1), nn.Upsample(scale_factor=8))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.backbone.forward_features(images)[:, 1:]
        side = images.shape[-1] // 8
        grid = tokens.transpose(1, 2).reshape(len(images), 64, side, side)
        classes: torch.Tensor = self.decode(grid)
        return classes


def build(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    if name == "segmenter":
        return Segmenter().eval(), 32
    if name == "swin_tiny_patch4_window7_224":
        arguments = {"depths": (2, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)}
        return timm.create_model(name, num_classes=5, img_size=56, **arguments).eval(), 56
    return timm.create_model(name, num_classes=5, **_SMALL).eval(), 32


@pytest.mark.parametrize(
    ("name", "is_rotated"),
    [
        ("vit_tiny_patch16_224", False),
        ("deit_tiny_patch16_224", True),
        ("deit_tiny_distilled_patch16_224", True),
        ("swin_tiny_patch4_window7_224", True),
        ("segmenter", False),
    ],
)
def test_it_is_pruned_in_mixed_patterns_exported_and_run_by_the_engine(
    name: str, is_rotated: bool, tmp_path: Path
) -> None:
    model, size = build(name)
    found = walk(model, image_size=size)
    count = 264 if name.startswith("swin") else 48  # its last stage has 4 tokens an image
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    if is_rotated:
        model = rotated(model, found, images)
    patterns = tuple(parse_pattern(text) for text in ("32x1", "16x16"))
    moments = gather_moments(model, found, images[:4], None, patterns=patterns, batch=4)
    first = found.layers[0]
    layer = model.get_submodule(first.name)
    assert isinstance(layer, nn.Linear)
    curves = list(layer_curves(first, layer, moments[first.name], images=4))
    assert len(curves) == 4
    assert all(curve.distortion[-1] > 0.0 for curve in curves)

    forms = {
        shape.name: Form(pattern=patterns[index % 2], sparsity=0.5)
        for index, shape in enumerate(found.layers)
    }
    *_, (_, pruned) = prune(model, found, forms, images)
    for layer_name, form in forms.items():
        weight = pruned.get_parameter(f"{layer_name}.weight")
        assert float((weight == 0).float().mean()) == pytest.approx(form.sparsity, abs=0.02)
    path = tmp_path / "m.onnx"
    by_layer = {layer_name: form.pattern for layer_name, form in forms.items()}
    export_onnx(pruned, found, by_layer, path, image_size=size, shrunk=True)
    compared = compare_runtimes(
        pruned, path, images[:2], engine="openvino", threads=1, tolerance=1e-3
    )
    assert max(compared.onnxruntime_error, compared.engine_error) < 1e-4
