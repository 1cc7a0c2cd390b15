"""The OpenVINO engine: sparse nodes like float64, and every unfit file refused in words."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines import load_engine, openvino_node
from tests.native.onnx_models import (
    branch_outputs,
    dense_model,
    expected_output,
    random_input,
    random_matrix,
    save,
    sparse_model,
)


@pytest.fixture(autouse=True, params=["native operator", "operator in Python"])
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here runs with both forms of the sparse node."""
    if request.param == "operator in Python":
        monkeypatch.setattr(openvino_node, "native_operators", lambda: None)
    else:
        assert openvino_node.native_operators() is not None, "run: python hatch_build.py"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return dense_model(tmp_path / "dense.onnx")


def test_openvino_runs_a_dense_model(model: Path) -> None:
    x = random_input(2, 3, 4, 4)
    with load_engine("openvino", model) as engine:
        expected = x.mean(axis=(2, 3)) @ np.arange(15, dtype=np.float32).reshape(3, 5)
        assert np.abs(engine.infer(x) - expected).max() < 1e-5
        kernels = engine.kernels()
    assert any(kernel.startswith(("FullyConnected", "MatMul")) for kernel in kernels.values())


@pytest.mark.parametrize("block", [(64, 1), (64, 16), (32, 32), (8, 8), (1, 1)])
@pytest.mark.parametrize("shape", [(1, 65, 192), (197, 192), (3, 192), (2, 3, 5, 192)])
@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_runs_sparse_nodes_like_float64(
    block: tuple[int, int], shape: tuple[int, ...], threads: int, tmp_path: Path
) -> None:
    matrices = [random_matrix(768, 192, block), random_matrix(192, 768, block)]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=list(shape), activation="gelu")
    x = random_input(*shape)
    with load_engine("openvino", path, threads=threads) as engine:
        assert np.abs(engine.infer(x) - expected_output(x, matrices, "gelu")).max() < 1e-5


def test_openvino_takes_any_batch_where_the_model_leaves_it_open(tmp_path: Path) -> None:
    matrices = [random_matrix(128, 64, (64, 1)), random_matrix(64, 128, (64, 1))]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=["batch", 5, 64])
    with load_engine("openvino", path) as engine:
        assert engine.input_shape == (-1, 5, 64)
        for batch in (3, 1):
            x = random_input(batch, 5, 64)
            assert np.abs(engine.infer(x) - expected_output(x, matrices)).max() < 1e-5


def test_openvino_runs_a_layer_without_any_block(tmp_path: Path) -> None:
    matrices = [random_matrix(64, 64, (64, 1), density=0)]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=[1, 65, 64])
    x = random_input(1, 65, 64)
    with load_engine("openvino", path) as engine:
        assert np.array_equal(engine.infer(x), expected_output(x, matrices).astype(np.float32))


def test_openvino_names_the_kernel_of_every_sparse_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = [random_matrix(64, 64, (64, 1)), random_matrix(64, 64, (32, 16))]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=[1, 65, 64])
    monkeypatch.setenv("LPVIT_ISA", "portable")
    with load_engine("openvino", path) as engine:
        assert engine.kernels() == {
            "layer0": "lpvit_portable block 64x1",
            "layer1": "lpvit_portable block 32x16",
        }


def test_openvino_prefers_the_kernel_to_the_function_that_the_file_carries(tmp_path: Path) -> None:
    matrices = [random_matrix(64, 64, (64, 1))]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=[1, 65, 64])
    body = helper.make_function(
        "lpvit",
        "BlockSparseLinear",
        ["X", "values", "row_ptr", "col_idx", "bias"],
        ["Y"],
        [helper.make_node("Identity", ["X"], ["Y"])],  # wrong on purpose, to tell them apart
        [helper.make_opsetid("", 17)],
        ["block_rows", "block_cols", "out_features", "activation"],
    )
    save(onnx.load(path).graph, path, functions=(body,))
    x = random_input(1, 65, 64)
    with load_engine("openvino", path) as engine:
        assert np.abs(engine.infer(x) - expected_output(x, matrices)).max() < 1e-5


def test_openvino_keeps_two_sparse_nodes_on_one_input_apart(tmp_path: Path) -> None:
    matrices = [random_matrix(64, 64, (64, 1)), random_matrix(64, 64, (32, 16))]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=[1, 65, 64])
    model = onnx.load(path)
    first, second, last = model.graph.node
    second.input[0] = "x"  # like the query and the key of an attention
    last.CopyFrom(helper.make_node("Sub", [first.output[0], second.output[0]], ["y"]))
    onnx.save(model, path)
    x = random_input(1, 65, 64)
    one, two = branch_outputs(x, matrices)
    with load_engine("openvino", path) as engine:
        assert np.abs(engine.infer(x) - (one - two)).max() < 1e-5


def test_two_engines_in_one_process_give_their_own_results(tmp_path: Path) -> None:
    matrices = [[random_matrix(256, 192, (64, 1))], [random_matrix(256, 192, (8, 8))]]
    paths = [
        sparse_model(tmp_path / f"{i}.onnx", m, shape=[1, 197, 192]) for i, m in enumerate(matrices)
    ]
    x = random_input(1, 197, 192)
    with load_engine("openvino", paths[0]) as a, load_engine("openvino", paths[1]) as b:
        expected = [expected_output(x, m) for m in matrices]
        with ThreadPoolExecutor(2) as pool:
            for _ in range(50):
                results = list(pool.map(lambda engine: engine.infer(x), (a, b)))
                for result, right in zip(results, expected, strict=True):
                    assert np.abs(result - right).max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_rows": 32}, r"the node declares blocks of 32x1"),
        ({"out_features": 128}, r"row_ptr has 2 entries; 2 block rows need 3"),
        ({"activation": "relu"}, r"no activation 'relu'"),
    ],
)
def test_openvino_refuses_a_sparse_node_that_does_not_fit(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    matrices = [random_matrix(64, 64, (64, 1))]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=[1, 65, 64], changes=changes)
    with pytest.raises(EngineError, match=message):
        load_engine("openvino", path)


def test_openvino_refuses_an_input_that_the_kernel_would_read_as_twice_its_size(
    tmp_path: Path,
) -> None:
    path = sparse_model(tmp_path / "m.onnx", [random_matrix(64, 64, (64, 1))], shape=[1, 65, 64])
    model = onnx.load(path)
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16))
    model.graph.node[1].input[0] = "half"
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"its input is f16; the node takes float32"):
        load_engine("openvino", path)


def test_openvino_refuses_a_column_outside_with_its_offset(tmp_path: Path) -> None:
    matrix = random_matrix(64, 64, (64, 1))
    matrix.col_idx[1] = 64  # after validation, as a file may hold it
    path = sparse_model(tmp_path / "m.onnx", [matrix], shape=[1, 65, 64])
    with pytest.raises(EngineError, match=r"a sparse node is unfit: col_idx\[1\] is 64; there are"):
        load_engine("openvino", path)


def test_openvino_refuses_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x09no model")
    with pytest.raises(EngineError, match=r"cannot compile .*broken\.onnx: OpenVINO refused with"):
        load_engine("openvino", path)


def test_an_openvino_that_is_too_old_is_refused_in_words(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openvino.__version__", "2025.3.0-19807")
    with pytest.raises(EnvironmentUnfitError, match=r"OpenVINO 2025\.3\.0-19807 is too old"):
        load_engine("openvino", model)


def test_openvino_refuses_two_inputs(tmp_path: Path) -> None:
    path = dense_model(tmp_path / "two.onnx", inputs=2)
    with pytest.raises(EngineError, match="2 inputs and 1 outputs"):
        load_engine("openvino", path)
