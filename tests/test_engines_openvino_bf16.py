"""The OpenVINO engine in bf16: the narrow kernel really runs, and stays near float32."""

from pathlib import Path

import numpy as np
import pytest

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines import PRECISIONS, engine_names, load_engine, native, openvino_node
from lpvit_engines.block_sparse import reference
from tests.native.onnx_models import (
    biases,
    dense_model,
    expected_output,
    random_input,
    random_matrix,
    sparse_model,
)
from tests.test_block_sparse_bf16 import ON_BF16, rounded, rounded_matrix

pytest.importorskip("openvino")


@pytest.fixture(params=["native operator", "operator in Python"])
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "operator in Python":
        monkeypatch.setattr(openvino_node, "native_operators", lambda: None)
    else:
        assert openvino_node.native_operators() is not None, "run: python hatch_build.py"


@ON_BF16
@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("block", [(64, 1), (64, 16), (8, 8)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sparse_node_in_bf16_is_float64_over_rounded_numbers_rounded_once(
    block: tuple[int, int], threads: int, tmp_path: Path
) -> None:
    matrix = random_matrix(768, 192, block)
    path = sparse_model(tmp_path / "m.onnx", [matrix], shape=[1, 197, 192])
    x = random_input(1, 197, 192)
    with load_engine("openvino", path, threads=threads, precision="bf16") as engine:
        y = engine.infer(x)
        kernels = [kernel for kernel in engine.kernels().values() if "block" in kernel]
    right = reference(rounded(x), rounded_matrix(matrix), bias=next(biases([matrix])))
    assert (np.abs(y - right) <= 2.0**-8 * np.abs(right) + 1e-5).all()
    assert kernels == [f"lpvit_avx512_bf16 block {block[0]}x{block[1]}"]


@ON_BF16
def test_a_sparse_node_takes_and_gives_bfloat16_inside_the_graph(tmp_path: Path) -> None:
    """Between two sparse nodes nothing is widened: no conversion is left in the compiled graph."""
    matrices = [random_matrix(768, 192, (64, 1)), random_matrix(192, 768, (64, 1))]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=[1, 197, 192], activation="gelu")
    with load_engine("openvino", path, threads=1, precision="bf16") as engine:
        kernels = list(engine.kernels().values())
        y, x = engine.infer(random_input(1, 197, 192)), random_input(1, 197, 192)
    sparse = [kernel for kernel in kernels if kernel == "lpvit_avx512_bf16 block 64x1"]
    assert len(sparse) == 2
    assert len(kernels) <= 4, kernels  # one conversion of the input and one of the output
    right = expected_output(x, matrices, "gelu")
    assert 0 < np.abs(y - right).max() < 0.02 * np.abs(right).max()


@ON_BF16
@pytest.mark.usefixtures("operator")
def test_sparse_nodes_in_bf16_keep_their_names(tmp_path: Path) -> None:
    matrices = [random_matrix(768, 192, (64, 1)), random_matrix(192, 768, (64, 1))]
    path = sparse_model(tmp_path / "m.onnx", matrices, shape=[1, 197, 192])
    names = []
    for precision in ("float32", "bf16"):
        with load_engine("openvino", path, threads=1, precision=precision) as engine:
            names.append({name for name, kernel in engine.kernels().items() if "64x1" in kernel})
    assert names[0] == names[1]
    assert len(names[0]) == 2


@ON_BF16
def test_a_dense_model_in_bf16_runs_and_rounds(tmp_path: Path) -> None:
    x = random_input(2, 3, 4, 4)
    path = dense_model(tmp_path / "dense.onnx")
    with (
        load_engine("openvino", path, threads=1) as wide,
        load_engine("openvino", path, threads=1, precision="bf16") as narrow,
    ):
        difference = np.abs(wide.infer(x) - narrow.infer(x)).max() / np.abs(wide.infer(x)).max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("name", engine_names())
def test_a_precision_that_an_engine_lacks_is_refused_with_those_it_has(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=f"{name} does not run in 'int3'; it has: ") as refused:
        load_engine(name, dense_model(tmp_path / "dense.onnx"), precision="int3")
    assert str(refused.value).endswith(", ".join(PRECISIONS[name]))


def test_bf16_is_refused_in_words_on_a_processor_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "BF16_INSTRUCTION_SET", "avx1024_bf16")
    with pytest.raises(EnvironmentUnfitError, match=r"bf16 needs AVX512_BF16 .* Run in float32"):
        load_engine("openvino", dense_model(tmp_path / "dense.onnx"), precision="bf16")
