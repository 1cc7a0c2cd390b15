"""The int8 kernels equal exact integers, stay within the rounding of each number, and keep NaN."""

import ctypes

import numpy as np
import pytest
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.block_sparse import BlockSparseMatrix, reference
from lpvit_engines.native import (
    INT8_INSTRUCTION_SETS,
    PackedLayer,
    fma_flops,
    instruction_set,
    instruction_sets,
)
from tests.test_block_sparse import (
    BLOCKS,
    TOKENS,
    backwards,
    random_array,
    random_matrix,
    run,
)

LEAST = -100  # of the integers in x, which reach to LEAST + 255, so that a token's scale is 1


def most_weight(isa: str) -> int:
    """AVX2 adds two products in 16 bits and keeps its weights within 7 bits for that."""
    return 63 if isa == "avx2_int8" else 127


def with_values(matrix: BlockSparseMatrix, values: NDArray[np.float32]) -> BlockSparseMatrix:
    return BlockSparseMatrix(
        values=values,
        row_ptr=matrix.row_ptr,
        col_idx=matrix.col_idx,
        in_features=matrix.in_features,
        out_features=matrix.out_features,
    )


def integer_matrix(
    block: tuple[int, int], isa: str, *, density: float = 0.5, grid: tuple[int, int] = (5, 7)
) -> BlockSparseMatrix:
    """Integers whose largest in each output is the largest level, so that its scale is 1."""
    matrix, most = random_matrix(*block, density=density, grid=grid), most_weight(isa)
    values = np.random.default_rng(1).integers(-most, most, matrix.values.shape, endpoint=True)
    first = np.unique(matrix.row_ptr[:-1][np.diff(matrix.row_ptr) > 0])
    values[first, :, 0] = most
    return with_values(matrix, values.astype(np.float32))


def integer_tokens(tokens: int, features: int) -> NDArray[np.float32]:
    x = np.random.default_rng(tokens).integers(LEAST, LEAST + 256, (tokens, features))
    x[:, 0], x[:, -1] = LEAST, LEAST + 255
    return x.astype(np.float32)


@pytest.fixture(params=instruction_sets("int8"))
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_every_block_shape_equals_exact_integers(block: tuple[int, int], isa: str) -> None:
    matrix = integer_matrix(block, isa)
    with PackedLayer(matrix, isa=isa) as layer:
        for tokens in TOKENS:
            x = integer_tokens(tokens, matrix.in_features)
            assert np.array_equal(run(layer, x), reference(x, matrix))


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", [(64, 1), (64, 64), (20, 3)])
def test_densities_zero_and_one_equal_exact_integers(
    block: tuple[int, int], density: float, isa: str
) -> None:
    matrix = integer_matrix(block, isa, density=density)
    x = integer_tokens(65, matrix.in_features)
    with PackedLayer(matrix, isa=isa) as layer:
        assert np.array_equal(run(layer, x), reference(x, matrix))


def test_the_largest_products_of_all_do_not_saturate(isa: str) -> None:
    matrix = integer_matrix((64, 16), isa, density=1.0)
    matrix = with_values(matrix, np.full_like(matrix.values, most_weight(isa)))
    x = np.full((13, matrix.in_features), LEAST + 255, np.float32)
    x[:, 0] = LEAST
    with PackedLayer(matrix, isa=isa) as layer:
        assert np.array_equal(run(layer, x), reference(x, matrix))
    with PackedLayer(with_values(matrix, -matrix.values), isa=isa) as layer:
        assert np.array_equal(run(layer, x), -reference(x, matrix))


@pytest.mark.parametrize("block", [(64, 1), (64, 16), (20, 3)])
def test_the_error_is_at_most_that_of_rounding_each_number_once(
    block: tuple[int, int], isa: str
) -> None:
    matrix = random_matrix(*block, density=0.5, grid=(3, 300 // block[1]))
    x = random_array(197, matrix.in_features)
    with PackedLayer(matrix, isa=isa) as layer:
        error = np.abs(run(layer, x) - reference(x, matrix))
    weight = matrix.to_dense().astype(np.float64)
    x_half = (x.max(1, keepdims=True) - x.min(1, keepdims=True)) / 255 / 2
    w_half = np.abs(weight).max(1) / most_weight(isa) / 2
    stored = weight != 0
    bound = x_half * np.abs(weight).sum(1) + np.abs(x) @ stored.T * w_half
    bound += x_half * w_half * stored.sum(1)
    assert (error <= bound * (1 + 1e-5)).all()
    assert error.max() > 1e-3 * bound.max()  # it is int8 that ran


def test_bias_and_gelu_follow_the_product(isa: str) -> None:
    matrix = integer_matrix((64, 1), isa)
    bias = random_array(matrix.out_features)
    x = integer_tokens(33, matrix.in_features)
    small = with_values(matrix, matrix.values * np.float32(2**-12))  # where GELU bends
    with PackedLayer(small, bias=bias, activation="gelu", isa=isa) as layer:
        right = reference(x, small, bias=bias, activation="gelu")
        assert np.abs(run(layer, x) - right).max() < 1e-5


def test_a_token_and_an_output_have_scales_of_their_own(isa: str) -> None:
    matrix = integer_matrix((64, 1), isa)
    x = integer_tokens(13, matrix.in_features)
    of_token = np.exp2(np.arange(13, dtype=np.float32))[:, None]
    of_output = np.exp2(-np.arange(64, dtype=np.float32))[:, None]
    scaled = with_values(matrix, matrix.values * of_output)
    with PackedLayer(scaled, isa=isa) as layer:
        assert np.array_equal(run(layer, x * of_token), reference(x * of_token, scaled))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_own_token_and_output_alone(isa: str, bad: float) -> None:
    matrix = random_matrix(64, 1, density=1.0)
    x = random_array(13, matrix.in_features)
    x[5, 3] = bad
    values = matrix.values.copy()
    values[2, 7] = bad  # an output of the first block row
    with PackedLayer(with_values(matrix, values), isa=isa) as layer:
        y = run(layer, x)
    assert np.isnan(y[5]).all()
    assert np.isnan(y[:, 7]).all()
    rest = np.delete(np.delete(y, 5, axis=0), 7, axis=1)
    assert np.isfinite(rest).all()


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-45, 3e38])
def test_very_small_and_very_large_numbers_stay_near_what_they_are(isa: str, size: float) -> None:
    matrix = random_matrix(64, 1, density=1.0)
    matrix = with_values(matrix, np.full_like(matrix.values, 1e-3))
    x = np.full((3, matrix.in_features), size, np.float32)
    with PackedLayer(matrix, isa=isa) as layer:
        assert np.abs(run(layer, x) - reference(x, matrix)).max() <= max(1e-30, 1e-2 * size)


@pytest.mark.parametrize("tokens", [197, 1000])
def test_tasks_cover_every_output_once(tokens: int, isa: str) -> None:
    matrix = random_matrix(64, 16, density=0.5, grid=(12, 48))
    x, count = random_array(tokens, matrix.in_features), list[int]()
    threads = backwards(count)
    with PackedLayer(matrix, threads=ctypes.addressof(threads), isa=isa) as layer:
        split = run(layer, x)
    with PackedLayer(matrix, isa=isa) as layer:
        assert np.array_equal(split, run(layer, x))
    assert count == [12, 12]  # to quantise X, and to multiply


def test_weights_take_a_quarter_of_the_memory() -> None:
    matrix = random_matrix(64, 16, density=1.0, grid=(5, 48))
    with (
        PackedLayer(matrix) as wide,
        PackedLayer(matrix, precision="int8") as narrow,
    ):
        assert narrow.isa in INT8_INSTRUCTION_SETS
        assert narrow.memory_bytes < 0.27 * wide.memory_bytes


def test_the_peak_loop_counts_four_products_a_lane(isa: str) -> None:
    lanes = {"avx512_vnni": 16, "avx2_int8": 8}.get(isa, 4)
    assert fma_flops(10, isa=isa) == 10 * 12 * lanes * 8


def test_more_features_than_an_exact_sum_takes_are_refused() -> None:
    weight = np.zeros((8, 65_544), np.float32)
    matrix = BlockSparseMatrix.from_dense(weight, block_rows=8, block_cols=8)
    with pytest.raises(EngineError, match="65544 input features: in int8"):
        PackedLayer(matrix, precision="int8")


def test_the_environment_variable_forces_the_int8_kernel_of_an_instruction_set(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = INT8_INSTRUCTION_SETS[isa]
    monkeypatch.setenv("LPVIT_ISA", forced)
    assert INT8_INSTRUCTION_SETS[instruction_set("int8")] == forced
    if isa != "neon_int8":  # which neon_dotprod replaces where it is there
        assert instruction_set("int8") == isa


def test_an_instruction_set_without_int8_is_refused_with_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LPVIT_ISA", "sse9")
    with pytest.raises(
        EnvironmentUnfitError, match=r"LPVIT_ISA=sse9, but this machine runs int8 on: .*portable"
    ):
        instruction_set("int8")
