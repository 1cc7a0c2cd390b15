"""The bfloat16 kernel equals float64 over rounded numbers, and says where it cannot run."""

import ctypes

import numpy as np
import pytest
from numpy.typing import NDArray

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_engines import native
from lpvit_engines.block_sparse import BlockSparseMatrix, reference
from lpvit_engines.native import BF16_INSTRUCTION_SET, PackedLayer, fma_flops, instruction_set
from lpvit_engines.native_library import library
from tests.test_block_sparse import (
    BLOCKS,
    TOKENS,
    assert_close,
    backwards,
    random_array,
    random_matrix,
    run,
    scale_of,
)

# A bfloat16 has 8 significant bits: rounding to the nearest is off by 2^-9 of the value at most,
# so a product of two rounded numbers by 2 * 2^-9 + 2^-18.
PRODUCT_ERROR = 2.0**-8 + 2.0**-18
HAS_BF16 = bool(library().lpvit_supports(BF16_INSTRUCTION_SET.encode()))
ON_BF16 = pytest.mark.skipif(not HAS_BF16, reason="needs a processor with AVX512_BF16")


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each value's nearest bfloat16, the even one in the middle."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def rounded_matrix(matrix: BlockSparseMatrix) -> BlockSparseMatrix:
    return BlockSparseMatrix(
        values=rounded(matrix.values),
        row_ptr=matrix.row_ptr,
        col_idx=matrix.col_idx,
        in_features=matrix.in_features,
        out_features=matrix.out_features,
    )


@ON_BF16
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_every_block_shape_equals_float64_over_rounded_numbers(block: tuple[int, int]) -> None:
    matrix = random_matrix(*block, density=0.5)
    bias = random_array(matrix.out_features)
    with PackedLayer(matrix, bias=bias, precision="bf16") as layer:
        for tokens in TOKENS:
            x = random_array(tokens, matrix.in_features)
            right = reference(rounded(x), rounded_matrix(matrix), bias=bias)
            assert_close(run(layer, x), right, scale_of(x, matrix))


@ON_BF16
@pytest.mark.parametrize("block", [(64, 1), (64, 16), (20, 3)])
def test_the_error_against_unrounded_numbers_is_that_of_rounding_each_once(
    block: tuple[int, int],
) -> None:
    matrix = random_matrix(*block, density=0.5, grid=(3, 300 // block[1]))
    x = random_array(197, matrix.in_features)
    with PackedLayer(matrix, precision="bf16") as layer:
        error = np.abs(run(layer, x) - reference(x, matrix))
    bound = PRODUCT_ERROR * scale_of(x, matrix)
    assert (error <= bound + 2e-6 * bound.max()).all()
    assert error.max() > 1e-4 * bound.max()  # it is bfloat16 that ran


@ON_BF16
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", [(64, 1), (20, 3)])
def test_densities_zero_and_one_equal_float64_over_rounded_numbers(
    block: tuple[int, int], density: float
) -> None:
    matrix = random_matrix(*block, density=density)
    x = random_array(65, matrix.in_features)
    with PackedLayer(matrix, precision="bf16") as layer:
        right = reference(rounded(x), rounded_matrix(matrix))
        assert_close(run(layer, x), right, scale_of(x, matrix))


@ON_BF16
def test_columns_that_are_not_stored_touch_nothing() -> None:
    matrix = random_matrix(64, 1, density=0.5, grid=(3, 33))
    x = random_array(13, matrix.in_features)
    unused = np.setdiff1d(np.arange(33), matrix.col_idx)
    x[:, unused] = np.nan
    with PackedLayer(matrix, precision="bf16") as layer:
        assert np.isfinite(run(layer, x)).all()


@ON_BF16
def test_an_odd_last_column_that_is_infinite_stays_infinite() -> None:
    """It is paired with zeros of its own, and zero times infinity is not a number."""
    matrix = random_matrix(64, 1, density=1.0, grid=(3, 7))
    x = random_array(5, 7)
    x[:, 6] = np.inf
    with PackedLayer(matrix, precision="bf16") as layer:
        assert np.isinf(run(layer, x)).all()


@ON_BF16
def test_bias_and_gelu_follow_the_product() -> None:
    matrix = random_matrix(64, 1, density=0.5)
    bias, x = random_array(matrix.out_features), random_array(2, 33, matrix.in_features)
    with PackedLayer(matrix, bias=bias, activation="gelu", precision="bf16") as layer:
        right = reference(rounded(x), rounded_matrix(matrix), bias=bias, activation="gelu")
        assert_close(run(layer, x), right, scale_of(x, matrix))


@ON_BF16
@pytest.mark.parametrize("tokens", [197, 1000])
def test_tasks_cover_every_output_once(tokens: int) -> None:
    matrix = random_matrix(64, 16, density=0.5, grid=(12, 48))
    x, count = random_array(tokens, matrix.in_features), list[int]()
    threads = backwards(count)
    with PackedLayer(matrix, threads=ctypes.addressof(threads), precision="bf16") as layer:
        split = run(layer, x)
    with PackedLayer(matrix, precision="bf16") as layer:
        assert np.array_equal(split, run(layer, x))
    assert count == [12, 12]  # to lay X out, and to multiply


@ON_BF16
@pytest.mark.parametrize("block", [(64, 1), (20, 3)])
def test_bfloat16_in_and_out_rounds_only_the_answer(block: tuple[int, int]) -> None:
    matrix = random_matrix(*block, density=0.5)
    x = rounded(random_array(65, matrix.in_features))
    halves = (x.view(np.uint32) >> 16).astype(np.uint16)
    out = np.zeros((65, matrix.out_features), np.uint16)
    with PackedLayer(matrix, precision="bf16") as layer:
        failed = library().lpvit_run_prepared(
            layer.addresses["layer"], None, halves.ctypes.data, 65, out.ctypes.data, 1
        )
        expected = rounded(run(layer, x))
    assert failed == 0
    assert np.array_equal((out.astype(np.uint32) << 16).view(np.float32), expected)


@ON_BF16
def test_weights_take_half_the_memory() -> None:
    matrix = random_matrix(64, 16, density=1.0)
    with (
        PackedLayer(matrix, isa="avx512") as wide,
        PackedLayer(matrix, precision="bf16") as narrow,
    ):
        assert narrow.memory_bytes < 0.55 * wide.memory_bytes


@ON_BF16
def test_its_registers_multiply_twice_as_many_numbers() -> None:
    assert fma_flops(10, precision="bf16") == 10 * 12 * 16 * 4


def test_a_processor_without_it_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldProcessor:
        @staticmethod
        def lpvit_supports(isa: bytes) -> int:
            return int(isa != BF16_INSTRUCTION_SET.encode())

    monkeypatch.setattr(native, "library", lambda: OldProcessor)
    with pytest.raises(EnvironmentUnfitError, match=r"bf16 needs AVX512_BF16 .* Run in float32"):
        instruction_set("bf16")


def test_a_forced_instruction_set_and_bf16_are_refused_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LPVIT_ISA", "portable")
    with pytest.raises(EnvironmentUnfitError, match="LPVIT_ISA=portable forces an instruction set"):
        instruction_set("bf16")
