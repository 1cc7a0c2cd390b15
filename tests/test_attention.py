"""The attention kernel against float64, and where it may and may not stand in a network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

timm = pytest.importorskip("timm")
pytest.importorskip("openvino")

import onnx  # noqa: E402
import torch  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

from lpvit_edge.errors import EngineError  # noqa: E402
from lpvit_edge.export import export_onnx  # noqa: E402
from lpvit_edge.layers import walk  # noqa: E402
from lpvit_edge.pattern import parse_pattern  # noqa: E402
from lpvit_edge.prune import Form  # noqa: E402
from lpvit_edge.trial import masked_by_magnitude  # noqa: E402
from lpvit_engines import load_engine, openvino_node  # noqa: E402
from lpvit_engines.native import instruction_sets  # noqa: E402
from lpvit_engines.native_library import tbb_threads  # noqa: E402
from lpvit_engines.openvino_attention import attention, kernel_address  # noqa: E402
from tests.native.onnx_models import (  # noqa: E402
    expected_output,
    random_input,
    random_matrix,
    save,
    sparse_model,
)
from tests.test_block_sparse_bf16 import ON_BF16, rounded  # noqa: E402

BF16 = "avx512_bf16"
ATTENTION_SETS = (*instruction_sets(), *((BF16,) if kernel_address(BF16, 64) else ()))
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}


def random_qkv(tokens: int, width: int, isa: str) -> NDArray[np.float32]:
    """Numbers that the instruction set need not round."""
    qkv = np.random.default_rng(0).standard_normal((tokens, width), np.float32)
    return rounded(qkv) if isa == BF16 else qkv


def expected_attention(qkv: NDArray[np.float32], heads: int) -> NDArray[np.float64]:
    tokens, head_dim = len(qkv), qkv.shape[1] // (3 * heads)
    q, k, v = qkv.astype(np.float64).reshape(tokens, 3, heads, head_dim).transpose(1, 2, 0, 3)
    scores = q @ k.transpose(0, 2, 1) / head_dim**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: NDArray[np.float64] = weights / weights.sum(-1, keepdims=True) @ v
    return out.transpose(1, 0, 2).reshape(tokens, -1)


@pytest.mark.parametrize("isa", ATTENTION_SETS)
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"),
    [(197, 6, 64), (1, 2, 64), (49, 3, 32), (65, 4, 64), (6, 1, 16), (577, 2, 64), (18, 3, 48)],
)
def test_attention_equals_float64(
    isa: str, threaded: bool, tokens: int, heads: int, head_dim: int
) -> None:
    qkv = random_qkv(tokens, 3 * heads * head_dim, isa)
    found = attention(qkv, heads=heads, isa=isa, threads=tbb_threads() if threaded else None)
    error = np.abs(found - expected_attention(qkv, heads)).max()
    if isa == BF16:  # rounds each weight of the softmax by 2^-9 of it at most
        assert error <= 2.0**-9 * np.abs(qkv).max() + 5e-6
    else:
        assert error < 5e-6


@pytest.mark.parametrize("isa", ATTENTION_SETS)
def test_one_key_that_outweighs_all_others_is_what_comes_out(isa: str) -> None:
    qkv = random_qkv(20, 3 * 16, isa)
    qkv[:, :16] = 1.0
    qkv[7, 16:32] = 300.0  # every other weight is below exp(-1000)
    out = attention(qkv, heads=1, isa=isa)
    assert np.array_equal(out, np.broadcast_to(qkv[7, 32:], out.shape))


@pytest.mark.parametrize("isa", ATTENTION_SETS)
def test_a_nan_does_not_stay_hidden(isa: str) -> None:
    qkv = np.zeros((20, 3 * 16), np.float32)
    qkv[3, 40] = np.nan
    assert np.isnan(attention(qkv, heads=1, isa=isa)[:, 8]).all()


@pytest.mark.parametrize("tokens", [192, 197])  # whole registers, and a rest
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("isa", ATTENTION_SETS)
def test_a_score_that_is_no_number_makes_its_rows_so(isa: str, value: float, tokens: int) -> None:
    qkv = random_qkv(tokens, 3 * 16, isa)
    qkv[5, 2] = value  # in a query: that row alone
    rows = np.isnan(attention(qkv, heads=1, isa=isa)).all(1)
    assert np.flatnonzero(rows).tolist() == [5]
    qkv = np.abs(random_qkv(tokens, 3 * 16, isa))
    qkv[5, 16 + 2] = np.nan  # in a key: every row
    assert np.isnan(attention(qkv, heads=1, isa=isa)).all()


@pytest.mark.parametrize("isa", ATTENTION_SETS)
def test_heads_that_fill_no_register_are_refused_in_words(isa: str) -> None:
    with pytest.raises(EngineError, match=f"no {isa} attention for heads of 6"):
        attention(np.zeros((4, 18), np.float32), heads=1, isa=isa)


def exported(path: Path, model: nn.Module, *, size: int, sparse: bool = True) -> Path:
    walked = walk(model, image_size=size)
    pattern = parse_pattern("32x1")
    forms = {s.name: Form(pattern=pattern, sparsity=0.5) for s in walked.layers} if sparse else {}
    masked = masked_by_magnitude(model, forms)
    export_onnx(masked, walked, dict.fromkeys(forms, pattern), path, image_size=size)
    return path


def vit(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    found: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=5, **{**VIT, **changes}
    ).eval()
    return found


def fused(path: Path, precision: str = "default") -> list[str]:
    with load_engine("openvino", path, threads=1, precision=precision) as engine:
        return [kernel for kernel in engine.kernels().values() if "attention" in kernel]


def test_every_attention_of_a_sparse_vit_runs_on_the_kernel_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(tmp_path / "m.onnx", vit(), size=32)
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
    assert [kernel.partition(" ")[2] for kernel in fused(path)] == ["attention 2 x 32"] * 2
    with load_engine("openvino", path, threads=2) as engine:
        ours = engine.infer(x)
    monkeypatch.setattr(openvino_node.SparseNodes, "fuse_attention", lambda *_: {})
    with load_engine("openvino", path, threads=2) as engine:
        assert np.abs(ours - engine.infer(x)).max() < 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize("sparse", [True, False])
def test_attention_in_int8_stays_in_floating_point_and_gives_nearly_the_same(
    sparse: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(tmp_path / "m.onnx", vit(), size=32, sparse=sparse)
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32), np.float32)
    assert [kernel.partition(" ")[2] for kernel in fused(path, "int8")] == ["attention 2 x 32"] * 2
    with load_engine("openvino", path, threads=2, precision="int8") as engine:
        ours = engine.infer(x)
    monkeypatch.setattr(openvino_node.SparseNodes, "fuse_attention", lambda *_: {})
    with load_engine("openvino", path, threads=2, precision="int8") as engine:
        assert np.abs(ours - engine.infer(x)).max() < 0.02 * np.abs(ours).max()


@ON_BF16
def test_attention_in_int8_multiplies_in_bfloat16_unless_another_set_is_forced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported(tmp_path / "m.onnx", vit(), size=32)
    assert {kernel.partition(" ")[0] for kernel in fused(path, "int8")} == {f"lpvit_{BF16}"}
    monkeypatch.setenv("LPVIT_ISA", "avx2")
    assert {kernel.partition(" ")[0] for kernel in fused(path, "int8")} == {"lpvit_avx2"}


def test_a_dense_network_stays_openvinos_own(tmp_path: Path) -> None:
    assert fused(exported(tmp_path / "m.onnx", vit(), size=32, sparse=False)) == []


def test_without_the_native_operator_attention_stays_openvinos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_node, "native_operators", lambda: None)
    assert fused(exported(tmp_path / "m.onnx", vit(), size=32)) == []


def test_attention_in_half_precision_is_left_alone(tmp_path: Path) -> None:
    """Its queries, keys and values are no float32, which the kernel would read past their end."""
    matrix = random_matrix(3 * 32, 32, (32, 1))
    path = sparse_model(tmp_path / "m.onnx", [matrix], shape=[1, 20, 32])
    model = onnx.load(path)
    arrays = {
        "split": np.array([1, 20, 3, 2, 16]),
        "joined": np.array([1, 20, 32]),
        "zero": np.array([0]),
        "scale": np.array(16**-0.5, np.float16),
    }
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.node.pop()
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Cast", ["y0"], "qkv", {"to": TensorProto.FLOAT16}),
        ("Reshape", ["qkv", "split"], "heads", {}),
        ("Transpose", ["heads"], "each", {"perm": [2, 0, 3, 1, 4]}),
        ("Split", ["each"], "q1 k1 v1", {"axis": 0, "num_outputs": 3}),
        *(("Squeeze", [f"{n}1", "zero"], n, {}) for n in "qkv"),
        ("Mul", ["q", "scale"], "scaled", {}),
        ("Transpose", ["k"], "kt", {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["scaled", "kt"], "scores", {}),
        ("Softmax", ["scores"], "weights", {"axis": -1}),
        ("MatMul", ["weights", "v"], "found", {}),
        ("Transpose", ["found"], "rows", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["rows", "joined"], "half", {}),
        ("Cast", ["half"], "y", {"to": TensorProto.FLOAT}),
    ]
    for kind, inputs, output, attributes in steps:
        model.graph.node.append(helper.make_node(kind, inputs, output.split(), **attributes))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    save(model.graph, path, opset=20)
    assert fused(path) == []
    x = random_input(1, 20, 32)
    with load_engine("openvino", path, threads=1) as engine:
        y = engine.infer(x)
    right = expected_attention(expected_output(x, [matrix])[0].astype(np.float32), 2)
    assert np.abs(y[0] - right).max() < 0.01 * np.abs(right).max()


def test_attention_with_a_norm_on_queries_and_keys_is_left_alone(tmp_path: Path) -> None:
    model = vit(qk_norm=True)
    assert fused(exported(tmp_path / "m.onnx", model, size=32)) == []


def test_another_scale_is_left_alone(tmp_path: Path) -> None:
    model = vit(depth=1)
    attention_module = model.get_submodule("blocks.0.attn")
    attention_module.fused_attn = False  # type: ignore[assignment]
    attention_module.scale = 0.5  # type: ignore[assignment]
    assert fused(exported(tmp_path / "m.onnx", model, size=32)) == []


def test_swins_biased_and_masked_windows_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    arguments = {"depths": (2,), "embed_dim": 32, "num_heads": (2,), "window_size": 7}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, num_classes=5, **arguments
    ).eval()
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            nn.init.normal_(parameter)
    assert fused(exported(tmp_path / "m.onnx", model, size=56)) == []
