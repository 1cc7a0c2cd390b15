"""Small ONNX models, dense and with sparse nodes, and what they must compute."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lpvit_engines.block_sparse import BlockSparseMatrix, reference

SEED = 3


def dense_model(path: Path, *, inputs: int = 1, features: bool = False) -> Path:
    """Means of a (2, 3, 4, 4) image per channel, times a (3, 5) weight.

    With `features` the means are an output too.
    """
    weight = np.arange(15, dtype=np.float32).reshape(3, 5)
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "w"], ["logits"], name="head"),
    ]
    names = ["x", *(f"unused{i}" for i in range(inputs - 1))]
    outputs = {"logits": [2, 5]}
    if features:
        nodes.append(helper.make_node("Identity", ["means"], ["features"]))
        outputs["features"] = [2, 3]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3, 4, 4]) for n in names],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
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


def save(
    graph: onnx.GraphProto,
    path: Path,
    *,
    functions: tuple[onnx.FunctionProto, ...] = (),
    opset: int = 17,
) -> Path:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("lpvit", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions)
    onnx.save(model, path)
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


def branch_outputs(
    x: NDArray[np.float32], matrices: list[BlockSparseMatrix]
) -> list[NDArray[np.float64]]:
    """What each node gives where all of them read the model's input."""
    return [
        reference(x, matrix, bias=bias)
        for matrix, bias in zip(matrices, biases(matrices), strict=True)
    ]
