from pathlib import Path
from typing import Any

import pytest

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from lpvit_edge.export import compare_runtimes, export_onnx  # noqa: E402
from lpvit_edge.layers import Walk, walk  # noqa: E402
from lpvit_edge.pattern import Pattern, parse_pattern  # noqa: E402
from lpvit_edge.shrink import Bias, shrink  # noqa: E402

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "depths": (1, 1, 1, 1), "embed_dim": 32, "num_heads": (2, 2, 4, 8)},
    ),
}
BLOCK = {"vit": "blocks.0", "swin": "layers.0.blocks.0"}


def build(name: str) -> tuple[nn.Module, Walk, int]:
    architecture, size, arguments = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5, **arguments).eval()
    for parameter in model.parameters():  # timm starts biases at zero
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    return model, walk(model, image_size=size), size


def weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(f"{name}.weight").data


def test_a_network_without_zeros_is_left_as_it_is() -> None:
    model, walked, size = build("vit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert shrink(model, walked, {}, image_size=size) == ()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", ["16x1", None])
def test_dead_neurons_heads_and_layers_leave_the_file_and_both_runtimes_agree(
    name: str, pattern: str | None, tmp_path: Path
) -> None:
    model, walked, size = build(name)
    block = BLOCK[name]
    widths = {shape.name: shape.in_features for shape in walked.layers}
    hidden = widths[f"{block}.mlp.fc2"]
    heads = {"vit": 4, "swin": 2}[name]
    head = widths[f"{block}.attn.proj"] // heads
    weight(model, f"{block}.mlp.fc2")[:, :32] = 0.0  # nobody reads these neurons
    weight(model, f"{block}.mlp.fc1")[48:64] = 0.0  # these always answer the same
    weight(model, f"{block}.attn.proj")[:, :head] = 0.0  # nobody reads the first head
    last = walked.layers[-1].name
    weight(model, last)[:] = 0.0
    patterns: dict[str, Pattern] = {}
    if pattern is not None:
        patterns = {s.name: parse_pattern(pattern) for s in walked.layers if block in s.name}
    path = tmp_path / "m.onnx"
    gone = export_onnx(model, walked, patterns, path, image_size=size, shrunk=True)
    assert gone == (
        f"{block}.attn: 1 of {heads} heads removed",
        f"{block}.mlp: 48 of {hidden} neurons removed",
        f"{last}: all zero, only its bias is left",
    )
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    compared = compare_runtimes(model, path, images, engine="openvino", threads=1, tolerance=1e-3)
    assert max(compared.onnxruntime_error, compared.engine_error) < 1e-4
    shapes = {tuple(i.dims) for i in onnx.load(path).graph.initializer}
    width = walked.layers[0].in_features
    if pattern is None:
        assert {(width, hidden - 48), (width, 3 * (width - head))} <= shapes


def test_only_whole_blocks_go() -> None:
    model, walked, size = build("vit")
    weight(model, "blocks.0.mlp.fc2")[:, :40] = 0.0
    patterns = {"blocks.0.mlp.fc1": parse_pattern("32x1")}
    gone = shrink(model, walked, patterns, image_size=size)
    assert gone == ("blocks.0.mlp: 32 of 256 neurons removed",)


def test_heads_stay_where_their_channels_are_normed_together() -> None:
    model, walked, size = build("vit")
    attention = model.get_submodule("blocks.0.attn")
    attention.norm = nn.LayerNorm(64)
    weight(model, "blocks.0.attn.proj")[:, :16] = 0.0
    assert shrink(model, walked, {}, image_size=size) == ()
    assert attention.num_heads == 4


def test_a_layer_that_is_all_zero_becomes_its_bias() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(Bias(layer)(x), layer(x))
