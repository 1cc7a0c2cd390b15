"""One contract for every engine, the fake included, and what is OpenVINO's own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lpvit_edge.errors import EngineError, UnknownEngineError
from lpvit_engines import Engine, engine_names, load_engine
from lpvit_engines.block_sparse import BlockSparseMatrix, reference

SEED = 3


def dense_model(path: Path, *, inputs: int = 1) -> Path:
    """Means of a (2, 3, 4, 4) image per channel, times a (3, 5) weight."""
    weight = np.arange(15, dtype=np.float32).reshape(3, 5)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "w"], ["logits"], name="head"),
    ]
    names = ["x", *(f"unused{i}" for i in range(inputs - 1))]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 4, 4]) for n in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [2, 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    return save(graph, path)


def sparse_model(
    path: Path,
    matrices: list[BlockSparseMatrix],
    *,
    shape: list[int | str],
    activation: str = "none",
    changes: dict[str, Any] | None = None,
) -> Path:
    """A chain of sparse nodes layer0, layer1, ..., each with the bias that biases() gives.

    `changes` overwrites attributes of the nodes.
    """
    nodes, initializers, last = [], [], "x"
    for i, (matrix, bias) in enumerate(zip(matrices, biases(matrices), strict=True)):
        arrays = (matrix.values, matrix.row_ptr, matrix.col_idx, bias)
        names = [f"layer{i}.{n}" for n in ("values", "row_ptr", "col_idx", "bias")]
        initializers += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        declared: dict[str, Any] = {
            "block_rows": matrix.block_rows,
            "block_cols": matrix.block_cols,
            "out_features": matrix.out_features,
            "activation": activation,
        } | (changes or {})
        nodes.append(
            helper.make_node(
                "BlockSparseLinear",
                [last, *names],
                [f"y{i}"],
                name=f"layer{i}",
                domain="lpvit",
                **declared,
            )
        )
        last = f"y{i}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    out_shape = [*shape[:-1], matrices[-1].out_features]
    graph = helper.make_graph(
        nodes,
        "sparse",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out_shape)],
        initializers,
    )
    return save(graph, path)


def save(graph: onnx.GraphProto, path: Path) -> Path:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("lpvit", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def biases(matrices: list[BlockSparseMatrix]) -> Iterator[NDArray[np.float32]]:
    rng = np.random.default_rng(SEED)
    for matrix in matrices:
        yield rng.standard_normal(matrix.out_features, dtype=np.float32)


def random_matrix(
    rows: int, columns: int, block: tuple[int, int], *, density: float = 0.4
) -> BlockSparseMatrix:
    rng = np.random.default_rng(SEED)
    R, C = block
    weight = rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)
    weight *= np.kron(rng.random((rows // R, columns // C)) < density, np.ones(block, np.float32))
    return BlockSparseMatrix.from_dense(weight, block_rows=R, block_cols=C)


def random_input(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)


def expected_output(
    x: NDArray[np.float32], matrices: list[BlockSparseMatrix], activation: str = "none"
) -> NDArray[np.float64]:
    y = x.astype(np.float64)
    for matrix, bias in zip(matrices, biases(matrices), strict=True):
        y = reference(y, matrix, bias=bias, activation=activation)  # type: ignore[arg-type]
    return y


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return dense_model(tmp_path / "dense.onnx")


@pytest.fixture(params=engine_names())
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    with load_engine(request.param, model, threads=1) as loaded:
        assert loaded.name == request.param
        yield loaded


def test_an_engine_gives_one_row_per_image_and_gives_it_away(engine: Engine) -> None:
    x = np.zeros(engine.input_shape, np.float32)
    first = engine.infer(x)
    assert first.dtype == np.float32
    assert first.shape[0] == engine.input_shape[0]
    kept = first.copy()
    second = engine.infer(x + 1)
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, second)


def test_an_engine_names_its_kernels(engine: Engine) -> None:
    kernels = engine.kernels()
    assert kernels
    assert all(isinstance(name, str) and kernel for name, kernel in kernels.items())


def test_an_engine_refuses_another_shape(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"the input has shape \(7,\); this model was compiled"):
        engine.infer(np.zeros(7, np.float32))


def test_an_engine_refuses_another_dtype(engine: Engine) -> None:
    with pytest.raises(EngineError, match="the input is float64; convert it"):
        engine.infer(np.zeros(engine.input_shape))  # type: ignore[arg-type]


def test_a_closed_engine_says_so_and_closes_twice(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.infer(np.zeros(engine.input_shape, np.float32))


@pytest.mark.parametrize("name", engine_names())
def test_a_missing_model_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no model file .*absent\.onnx"):
        load_engine(name, tmp_path / "absent.onnx")


def test_an_unknown_engine_lists_the_known_ones(model: Path) -> None:
    with pytest.raises(UnknownEngineError, match="no engine 'tvm'; there are: fake, openvino"):
        load_engine("tvm", model)


def test_no_threads_are_refused(model: Path) -> None:
    with pytest.raises(EngineError, match="threads is 0; give 1 or more"):
        load_engine("fake", model, threads=0)


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


def test_openvino_refuses_two_inputs(tmp_path: Path) -> None:
    path = dense_model(tmp_path / "two.onnx", inputs=2)
    with pytest.raises(EngineError, match="2 inputs and 1 outputs"):
        load_engine("openvino", path)
