"""Packing blocks for the GPU: every weight comes back, every contradiction is told in words."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, LpvitEdgeError, ModelError
from lpvit_engines.cuda.half import from_bits, to_bits
from lpvit_engines.cuda.manifest import shipped_manifest
from lpvit_engines.cuda.packing import PANEL_COLS, TILE_ROWS, PackedWeight, pack
from tests.cuda.layers import Case, blocks_of, dense

SHAPES = sorted({(v.block_rows, v.block_cols) for v in shipped_manifest().variants})


def test_every_kernel_reads_panels_of_the_width_that_is_packed() -> None:
    sizes = {(variant.panel_cols, variant.tile_rows) for variant in shipped_manifest().variants}
    assert sizes == {(PANEL_COLS, TILE_ROWS)}


def unpacked(packed: PackedWeight) -> NDArray[np.float32]:
    """The dense weight, read the way the kernel reads it."""
    weight = np.zeros((packed.out_features, packed.in_features), np.float32)
    values = from_bits(packed.values, dtype=packed.dtype)
    for block_row, first, end, _ in packed.rows:
        out = slice(block_row * packed.block_rows, (block_row + 1) * packed.block_rows)
        for panel in range(first, end):
            for k in range(values.shape[2]):
                segment = (panel * values.shape[2] + k) // packed.block_cols
                column = packed.columns[segment] + k % packed.block_cols
                weight[out, column] += values[panel, :, k]
    return weight


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(["float16", "bfloat16"]),
    count=st.integers(2, 5),
    keep=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_what_the_kernel_reads_is_the_weight(
    shape: tuple[int, int], dtype: Any, count: int, keep: float, seed: int
) -> None:
    case = Case(
        block_rows=shape[0], block_cols=shape[1], block_row_count=count, keep=keep, seed=seed,
        in_features=320,
    )  # fmt: skip
    values, row_ptr, col_idx = blocks_of(case)
    packed = pack(values, row_ptr, col_idx, in_features=320, dtype=dtype)
    rounded = from_bits(to_bits(values, dtype=dtype), dtype=dtype)
    np.testing.assert_array_equal(
        unpacked(packed), dense(rounded, row_ptr, col_idx, in_features=320)
    )


def test_the_longest_rows_come_first() -> None:
    values = np.ones((7, 64, 64), np.float32)
    packed = pack(
        values, np.array([0, 1, 1, 5, 7]), np.array([2, 0, 1, 2, 3, 1, 3]), in_features=256
    )
    assert packed.rows.tolist() == [[2, 1, 5, 0], [3, 5, 7, 0], [0, 0, 1, 0], [1, 1, 1, 0]]


def test_a_partly_filled_panel_is_padded_with_zeros_that_point_at_column_0() -> None:
    packed = pack(np.ones((1, 64, 16)), np.array([0, 1]), np.array([3]), in_features=64)
    assert packed.columns.tolist() == [48, 0, 0, 0]
    assert not packed.values[:, :, 16:].any()


def test_a_weight_without_blocks_keeps_tensors_that_have_an_address() -> None:
    packed = pack(np.zeros((0, 64, 16)), np.array([0, 0]), np.array([], int), in_features=64)
    assert packed.values.shape == (1, 64, 64)
    assert packed.rows.tolist() == [[0, 0, 0, 0]]


GOOD: dict[str, Any] = {
    "values": np.ones((2, 64, 16)),
    "row_ptr": np.array([0, 1, 2]),
    "col_idx": np.array([0, 3]),
    "in_features": 64,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": np.ones((2, 64))}, ModelError, r"values has the shape \(2, 64\)"),
        ({"values": np.ones((2, 64, 24))}, EngineError, "no GPU kernel for blocks of 64x24"),
        ({"values": np.ones((2, 8, 8))}, EngineError, "allocate one of these shapes"),
        ({"in_features": 40}, ModelError, "in_features is 40"),
        ({"in_features": 0}, ModelError, "in_features is 0"),
        (
            {"values": np.ones((2, 64, 8)), "in_features": 40},
            EngineError,
            "in_features is 40; the GPU kernels copy 16",
        ),
        ({"row_ptr": np.array([0, 1, 3])}, ModelError, "runs from 0 to 3"),
        (
            {"row_ptr": np.array([0, 3, 2])},
            ModelError,
            "in 1 places and falls in 1 places",
        ),
        ({"row_ptr": np.array([1, 1, 2])}, ModelError, "runs from 1 to 2"),
        (  # the middle difference wraps to 2^63 - 1, and no length is negative
            {"row_ptr": np.array([0, 2**62, -(2**62) - 1, 2])},
            ModelError,
            "leaves that range in 2 places",
        ),
        ({"row_ptr": np.array([0])}, ModelError, "one per block row and one more"),
        ({"row_ptr": np.array([0.0, 1.0, 2.0])}, ModelError, "must hold integers"),
        ({"col_idx": np.array([0])}, ModelError, "each of the 2 blocks"),
        ({"col_idx": np.array([0.0, 1.0])}, ModelError, "one integer"),
        ({"col_idx": np.array([0, 4])}, ModelError, "block column 4; this weight has 0 to 3"),
        ({"col_idx": np.array([-1, 3])}, ModelError, "block column -1"),
        (
            {"row_ptr": np.array([0, 2, 2]), "col_idx": np.array([3, 0])},
            ModelError,
            "does not rise within a block row",
        ),
        (
            {"row_ptr": np.array([0, 2, 2]), "col_idx": np.array([1, 1])},
            ModelError,
            "keep each position once",
        ),
        ({"values": np.full((2, 64, 16), np.nan)}, ModelError, "not finite in float16"),
        ({"values": np.full((2, 64, 16), 7e4)}, ModelError, "use bfloat16"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused_in_words(
    change: dict[str, Any], error: type[LpvitEdgeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        pack(**(GOOD | change))


def test_a_weight_beyond_32_bits_is_refused() -> None:
    # One block per row, each in a panel of its own: 524,288 panels of 64 x 64 are 2^31 elements.
    blocks = 524_288
    values = np.broadcast_to(np.zeros((1, 64, 8), np.float32), (blocks, 64, 8))
    with pytest.raises(EngineError, match=r"2147483648 elements.*split the layer"):
        pack(values, np.arange(blocks + 1), np.zeros(blocks, int), in_features=16)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bfloat16_rounds_to_the_nearest_and_ties_to_even(value: float) -> None:
    exact = np.float64(np.float32(value))
    wide = int(np.float32(value).view(np.uint32))
    below = np.array([wide >> 16 << 16], np.uint32).view(np.float32)[0]
    above_bits = min((wide >> 16) + 1, 0xFFFF) << 16
    above = np.array([above_bits], np.uint32).view(np.float32)[0]
    if not np.isfinite(above):
        return  # the largest of all may round to infinity, which to_bits refuses
    found = from_bits(to_bits(np.array([value]), dtype="bfloat16"), dtype="bfloat16")[0]
    assert found in (below, above)
    other = above if found == below else below
    assert abs(exact - found) <= abs(exact - np.float64(other))
    if abs(exact - found) == abs(exact - np.float64(other)) and below != above:
        assert not np.float32(found).view(np.uint32) >> 16 & 1


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 3.4e38])
def test_what_bfloat16_cannot_hold_is_refused(special: float) -> None:
    with pytest.raises(ModelError, match="not finite in bfloat16"):
        to_bits(np.array([0.5, special]), dtype="bfloat16")
