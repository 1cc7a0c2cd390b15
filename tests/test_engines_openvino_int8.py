"""The OpenVINO engine in int8: linear layers, sparse and dense, really run so, near float32."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lpvit_engines import load_engine, openvino_node
from lpvit_engines.native import INT8_INSTRUCTION_SETS
from tests.native.onnx_models import (
    dense_model,
    expected_output,
    random_input,
    random_matrix,
    save,
    sparse_model,
)

pytest.importorskip("openvino")

TOKENS, WIDTH, HIDDEN = 197, 192, 768


@pytest.fixture(params=["native operator", "operator in Python"])
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "operator in Python":
        monkeypatch.setattr(openvino_node, "native_operators", lambda: None)
    else:
        assert openvino_node.native_operators() is not None, "run: python hatch_build.py"


def dense_layers(
    path: Path, *, approximate: str = "none", bias_shape: list[int], output: str = "y"
) -> Path:
    """fc1 with bias and GELU, fc2 without bias (output m2), and a head of one token (y)."""
    rng = np.random.default_rng(5)
    shapes = {"w1": [WIDTH, HIDDEN], "b1": bias_shape, "w2": [HIDDEN, WIDTH], "w3": [WIDTH, 10]}
    arrays = {
        name: rng.standard_normal(shape).astype(np.float32) / np.float32(shape[0] ** 0.5)
        for name, shape in shapes.items()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], name="fc1"),
        helper.make_node("Add", ["m1", "b1"], ["a1"]),
        helper.make_node("Gelu", ["a1"], ["g1"], approximate=approximate),
        helper.make_node("MatMul", ["g1", "w2"], ["m2"], name="fc2"),
        helper.make_node("ReduceMean", ["m2", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "w3"], ["y"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, TOKENS, WIDTH])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()]
        + [numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    return save(graph, path, opset=20)


def difference(path: Path, x: NDArray[np.float32]) -> tuple[float, list[str]]:
    """Of int8 from float32, of the largest output; and the kernels of int8 that are ours."""
    with (
        load_engine("openvino", path, threads=1) as wide,
        load_engine("openvino", path, threads=1, precision="int8") as narrow,
    ):
        y = wide.infer(x)
        off = float(np.abs(narrow.infer(x) - y).max() / np.abs(y).max())
        return off, [kernel for kernel in narrow.kernels().values() if "lpvit_" in kernel]


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("block", [(64, 1), (64, 16), (8, 8)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sparse_node_in_int8_is_near_float64(
    block: tuple[int, int], threads: int, tmp_path: Path
) -> None:
    matrix = random_matrix(768, 192, block)
    path = sparse_model(tmp_path / "m.onnx", [matrix], shape=[1, 197, 192])
    x = random_input(1, 197, 192)
    with load_engine("openvino", path, threads=threads, precision="int8") as engine:
        y = engine.infer(x)
        kernels = [kernel for kernel in engine.kernels().values() if "block" in kernel]
    right = expected_output(x, [matrix])
    assert 0 < np.abs(y - right).max() < 0.02 * np.abs(right).max()
    assert len(kernels) == 1
    assert kernels[0].endswith(f" block {block[0]}x{block[1]}")
    assert kernels[0].partition(" ")[0].removeprefix("lpvit_") in INT8_INSTRUCTION_SETS


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("bias_shape", [[HIDDEN], [1, 1, HIDDEN]])
def test_dense_layers_run_in_int8_with_their_bias_and_gelu_and_the_head_does_not(
    bias_shape: list[int], tmp_path: Path
) -> None:
    path = dense_layers(tmp_path / "m.onnx", bias_shape=bias_shape)
    off, ours = difference(path, random_input(1, TOKENS, WIDTH))
    assert 0 < off < 0.02
    assert [kernel.partition(" ")[2] for kernel in ours] == ["dense", "dense"]
    with load_engine("openvino", path, threads=1, precision="int8") as engine:
        others = " ".join(engine.kernels().values())
    assert "Gelu" not in others
    assert "FullyConnected" in others


@pytest.mark.parametrize(
    ("approximate", "bias_shape"), [("tanh", [HIDDEN]), ("none", [TOKENS, HIDDEN])]
)
def test_a_gelu_that_is_not_exact_or_a_bias_for_each_token_stays_openvinos(
    approximate: str, bias_shape: list[int], tmp_path: Path
) -> None:
    path = dense_layers(tmp_path / "m.onnx", approximate=approximate, bias_shape=bias_shape)
    off, ours = difference(path, random_input(1, TOKENS, WIDTH))
    assert 0 < off < 0.02
    assert len(ours) == 2


def test_layers_keep_their_names_and_outputs_theirs(tmp_path: Path) -> None:
    path = dense_layers(tmp_path / "m.onnx", bias_shape=[HIDDEN], output="m2")
    x = random_input(1, TOKENS, WIDTH)
    with load_engine("openvino", path, threads=1, precision="int8") as engine:
        ours = [name for name, kernel in engine.kernels().items() if "lpvit_" in kernel]
        assert ours == ["fc1", "m2"]  # the last node bears its output's name everywhere
        assert engine.outputs == ("m2",)
        assert engine.infer_all(x)["m2"].shape == (1, TOKENS, WIDTH)


def test_a_network_without_a_layer_for_int8_runs_in_float32(tmp_path: Path) -> None:
    off, ours = difference(dense_model(tmp_path / "dense.onnx"), random_input(2, 3, 4, 4))
    assert off == 0
    assert ours == []
