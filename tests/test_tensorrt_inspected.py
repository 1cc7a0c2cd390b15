"""Whether attention is fused, and whether what was reverted really runs dense."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from onnx import TensorProto, helper

from lpvit_edge import tensorrt_build
from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.attention import AttentionCount, count_attention
from lpvit_engines.tensorrt.inspector import EngineLayer
from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy
from lpvit_engines.tensorrt.sparsity import LayerProof, SparsityCount, confirm
from tests.test_tensorrt_int8 import two_four_layer


def test_a_reverted_layer_that_runs_sparse_all_the_same_is_said() -> None:
    proof = LayerProof(
        layer="fc1", pattern="2:4", dense_ms=1.0, sparse_ms=1.2, kernel="x", kept=False,
        reason="1.2 ms sparse against 1.0 ms dense",
    )  # fmt: skip
    sparse = EngineLayer(name="g", kernel="sm80_spmma", originals=("fc1/MatMul",), sparse=True)
    counted = SparsityCount(eligible=1, chosen=1)
    (found,) = confirm([proof], [sparse], counted)
    assert not found.kept
    assert (found.reason or "").endswith("built dense, and a sparse kernel runs all the same")
    dense = msgspec.structs.replace(sparse, kernel="sm80_gemm", sparse=False)
    assert confirm([proof], [dense], counted)[0].reason == proof.reason


def test_a_layer_that_cannot_be_built_dense_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"layer fc9 is to run dense .* no product of that name"):
        tensorrt_copy(two_four_layer(), dense=("fc9",))


def attention() -> Any:
    """softmax(q k) v, and a softmax over the classes, which is no attention."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 4]) for n in "qkvy"]
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["o"]),
        helper.make_node("Softmax", ["o"], ["y"]),
    ]
    return helper.make_model(helper.make_graph(nodes, "g", value[:3], value[3:]))


@pytest.mark.parametrize(
    ("name", "kernel", "fused"),
    [
        ("_gemm_mha_v2_myl0_7", "_gemm_mha_v2", 1),
        ("__mye8037", "sm87_fmha_v2_flash_f16", 1),
        ("blocks.0.mha/MatMul", "sm80_xmma_gemm", 0),
    ],
)
def test_attention_that_runs_as_one_kernel_is_counted(name: str, kernel: str, fused: int) -> None:
    layers = [EngineLayer(name=name, kernel=kernel, originals=(), sparse=False)]
    assert count_attention(attention(), layers) == AttentionCount(blocks=1, fused=fused)


def test_attention_that_tensorrt_does_not_fuse_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest: Any = SimpleNamespace(
        proofs=(), sparsity=SparsityCount(eligible=None, chosen=None), memory_skips=0,
        int8_layers=(), half_layers=(), attention=AttentionCount(blocks=12, fused=0),
    )  # fmt: skip
    tensorrt_build.show(manifest)
    said = " ".join(capsys.readouterr().err.split())
    assert "attention: 0 of 12 run as one kernel" in said
    assert "TensorRT runs attention in parts" in said
