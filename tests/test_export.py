from pathlib import Path
from typing import Any

import numpy as np
import pytest

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
pytest.importorskip("openvino")

import torch  # noqa: E402
from torch import nn  # noqa: E402

from lpvit_edge.check import refuse_unequal, weight_bytes  # noqa: E402
from lpvit_edge.errors import EngineError  # noqa: E402
from lpvit_edge.export import compare_runtimes, export_onnx  # noqa: E402
from lpvit_edge.layers import Walk, walk  # noqa: E402
from lpvit_edge.pattern import Pattern, parse_pattern  # noqa: E402
from lpvit_edge.prune import Form  # noqa: E402
from lpvit_edge.trial import masked_by_magnitude  # noqa: E402

MODELS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2},
    ),
    "deit-distilled": (
        "deit_tiny_distilled_patch16_224",
        32,
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 2},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "depths": (1, 2, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
    ),
}


def build(name: str) -> tuple[nn.Module, Walk, int]:
    architecture, size, arguments = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5, **arguments).eval()
    return model, walk(model, image_size=size), size


def sparse_copy(
    model: nn.Module, walked: Walk, pattern: Pattern, sparsity: float
) -> tuple[nn.Module, dict[str, Pattern]]:
    forms = {
        shape.name: Form(pattern=pattern, sparsity=sparsity)
        for shape in walked.layers
        if pattern.fits(shape.out_features, shape.in_features)
    }
    return masked_by_magnitude(model, forms), dict.fromkeys(forms, pattern)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", ["32x1", "16x16"])
def test_the_exported_sparse_model_computes_what_torch_does(
    name: str, pattern: str, tmp_path: Path
) -> None:
    model, walked, size = build(name)
    masked, patterns = sparse_copy(model, walked, parse_pattern(pattern), 0.5)
    assert len(patterns) == len(walked.layers)
    export_onnx(masked, walked, patterns, tmp_path / "m.onnx", image_size=size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    compared = compare_runtimes(
        masked, tmp_path / "m.onnx", images, engine="openvino", threads=1, tolerance=1e-3
    )
    assert compared.engine_tolerance == 1e-3
    assert max(compared.onnxruntime_error, compared.engine_error) < 1e-4


@pytest.mark.parametrize("sparsity", [0.5, 1.0])  # equal weights, as of no block, are kept once
def test_the_file_is_portable_and_names_its_nodes_after_the_layers(
    sparsity: float, tmp_path: Path
) -> None:
    model, walked, size = build("vit")
    masked, patterns = sparse_copy(model, walked, parse_pattern("32x1"), sparsity)
    export_onnx(masked, walked, patterns, tmp_path / "m.onnx", image_size=size)
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto)
    sparse = [node for node in proto.graph.node if node.domain == "lpvit"]
    assert [node.name for node in sparse] == [shape.name for shape in walked.layers]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in sparse[2].attribute}
    assert attributes == {
        "block_rows": 32,
        "block_cols": 1,
        "out_features": 256,
        "activation": b"gelu",
        "plugin_namespace": b"lpvit",
        "plugin_version": b"1",
    }
    assert [function.name for function in proto.functions] == ["BlockSparseLinear"]
    assert not [node for node in proto.graph.node if node.op_type == "Gelu"]
    text = (tmp_path / "m.onnx").read_bytes()
    assert str(Path.home()).encode() not in text
    assert b"site-packages" not in text


def test_two_four_stays_a_plain_product_with_its_zeros_in_place(tmp_path: Path) -> None:
    model, walked, size = build("vit")
    masked, patterns = sparse_copy(model, walked, parse_pattern("2:4"), 0.5)
    export_onnx(masked, walked, patterns, tmp_path / "m.onnx", image_size=size)
    proto = onnx.load(tmp_path / "m.onnx")
    assert not [node for node in proto.graph.node if node.domain == "lpvit"]
    stored = [onnx.numpy_helper.to_array(i) for i in proto.graph.initializer]
    for shape in walked.layers:
        weight = masked.get_parameter(f"{shape.name}.weight").detach().numpy()
        assert ((weight != 0).reshape(-1, 4).sum(1) == 2).all()
        assert any(np.array_equal(array, form) for array in stored for form in (weight, weight.T))


def test_half_the_blocks_take_about_half_the_bytes(tmp_path: Path) -> None:
    model, walked, size = build("vit")
    masked, patterns = sparse_copy(model, walked, parse_pattern("32x1"), 0.5)
    export_onnx(masked, walked, patterns, tmp_path / "sparse.onnx", image_size=size)
    export_onnx(model, walked, {}, tmp_path / "dense.onnx", image_size=size)
    dense_linears = 4 * sum(s.in_features * s.out_features for s in walked.layers)
    saved = weight_bytes(tmp_path / "dense.onnx") - weight_bytes(tmp_path / "sparse.onnx")
    assert 0.44 * dense_linears < saved < 0.5 * dense_linears


def test_a_runtime_that_computes_something_else_is_refused_with_the_figure() -> None:
    with pytest.raises(EngineError, match=r"openvino differs from the torch model by 2.00e-02"):
        refuse_unequal({"onnxruntime": 1e-6, "openvino": 0.02}, tolerance=1e-3)
    with pytest.raises(EngineError, match="nan"):
        refuse_unequal({"openvino": float("nan")}, tolerance=1e-3)


def test_a_failed_export_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, walked, size = build("vit")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(model, walked, {}, tmp_path / "m.onnx", image_size=size)
    assert list(tmp_path.iterdir()) == []


def test_sparse_layers_that_share_an_input_stay_different_layers(tmp_path: Path) -> None:
    """OpenVINO merges operators it takes for equal: q, k and v of one input must not be."""
    from lpvit_edge.onnx_nodes import repeated_layer_model
    from lpvit_engines import load_engine
    from lpvit_engines.block_sparse import BlockSparseMatrix

    generator = np.random.default_rng(0)
    weights = [generator.standard_normal((32, 16), np.float32) for _ in range(3)]
    copies = [BlockSparseMatrix.from_dense(W, block_rows=8, block_cols=4) for W in weights]
    model = repeated_layer_model(
        tokens=5, in_features=16, out_features=32, activation="none", copies=[*copies]
    )
    for node in model.graph.node:
        if node.op_type == "BlockSparseLinear":
            node.input[0] = "x0"  # where each had an input of its own
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    x = generator.standard_normal((1, 5, 16), np.float32)
    with load_engine("openvino", tmp_path / "m.onnx", threads=1) as engine:
        found = engine.infer(x)[0, 0]
    normal = (x[0, 0] - x[0, 0].mean()) / np.sqrt(x[0, 0].var() + 1e-5)
    expected = [float(normal @ W[0]) - 1.0 for W in weights]  # the bias begins at -1
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("name", "heads"), [("vit", 1), ("deit-distilled", 2), ("swin", 1)])
def test_the_second_output_is_what_the_classifier_reads(
    name: str, heads: int, tmp_path: Path
) -> None:
    from lpvit_engines import load_engine

    model, walked, size = build(name)
    assert len(walked.heads) == heads
    export_onnx(model, walked, {}, tmp_path / "m.onnx", image_size=size)
    read: list[torch.Tensor] = []
    for head in walked.heads:
        model.get_submodule(head).register_forward_hook(lambda _, args, __: read.append(args[0]))
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(image)
    with load_engine("openvino", tmp_path / "m.onnx", threads=1) as engine:
        found = engine.infer_all(image.numpy())
    assert found["features"] == pytest.approx(torch.cat(read, 1).numpy(), abs=1e-4)
    assert found["logits"] == pytest.approx(logits.numpy(), abs=1e-4)


def test_a_model_that_no_linear_layer_answers_has_no_second_output(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(48, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(x.flatten(2)[..., :48]).mean(1)[:, :5].softmax(-1)  # type: ignore[no-any-return]

    model = Pooled().eval()
    walked = walk(model, image_size=8)
    assert walked.heads == {}
    export_onnx(model, walked, {}, tmp_path / "m.onnx", image_size=8)
    assert [output.name for output in onnx.load(tmp_path / "m.onnx").graph.output] == ["logits"]
