"""From the blocks of the ONNX node to the device format, once per layer when an engine is built.

The kept blocks of one block row are laid side by side along K, as segments, in panels of 64
columns. A row whose blocks do not fill its last panel is padded with segments of zeros that point
at column 0 (on average 1.5 segments per row at 16 columns, none at 64). The kernel walks the panels
of a row like a dense matrix; only the gather of X follows the column table.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, ModelError
from lpvit_engines.cuda.half import Bits, to_bits
from lpvit_engines.cuda.manifest import DType, shipped_manifest

Indices = NDArray[np.int32]
INT32_MAX = 2**31 - 1
# Of every kernel that ships; a test holds both against the manifest.
PANEL_COLS = 64
TILE_ROWS = 64  # tokens of a CTA


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A block-sparse weight (out_features, in_features) as the kernel reads it.

    values (panels, block_rows, 64) bit patterns of dtype; rows (block rows, 4) int32: block row,
    first panel, end panel, 0, with the longest rows first, so that the GPU starts them first;
    columns (panels * 64 / block_cols,) int32: where in X each segment begins.
    """

    values: Bits
    rows: Indices
    columns: Indices
    block_rows: int
    block_cols: int
    in_features: int
    out_features: int
    dtype: DType


def pack(
    values: NDArray[Any],
    row_ptr: NDArray[Any],
    col_idx: NDArray[Any],
    *,
    in_features: int,
    dtype: DType = "float16",
) -> PackedWeight:
    """Pack blocks (blocks, block_rows, block_cols) for the GPU.

    row_ptr (block rows + 1,) and col_idx (blocks,) are those of lpvit::BlockSparseLinear: the
    blocks of block row i are row_ptr[i] to row_ptr[i + 1], col_idx counts in blocks and rises
    within a row. Raises EngineError for a shape that no kernel computes, ModelError for arrays that
    contradict each other.
    """
    block_rows, block_cols = _block_shape(values)
    panel_cols = _panel_cols(block_rows, block_cols, dtype=dtype)
    _check_in_features(in_features, block_cols=block_cols)
    lengths = _row_lengths(row_ptr, blocks=len(values))
    _check_columns(col_idx, lengths=lengths, block_columns=in_features // block_cols)
    segments = panel_cols // block_cols
    panels = -(-lengths // segments)
    first_panel = np.cumsum(panels) - panels
    # A weight with no block at all keeps one panel of zeros, which no row refers to: tensors of no
    # elements have no address.
    total = max(1, int(panels.sum()))
    _check_size(total * block_rows * panel_cols)
    slots = _slots(lengths, first_segment=first_panel * segments)
    return PackedWeight(
        values=_panels(to_bits(values, dtype=dtype), slots=slots, shape=(total, segments)),
        rows=_longest_first(first_panel, panels),
        columns=_segment_columns(col_idx, slots=slots, count=total * segments, width=block_cols),
        block_rows=block_rows,
        block_cols=block_cols,
        in_features=in_features,
        out_features=len(lengths) * block_rows,
        dtype=dtype,
    )


def _block_shape(values: NDArray[Any]) -> tuple[int, int]:
    if values.ndim != 3:
        raise ModelError(
            f"values has the shape {values.shape}; it must be (blocks, block_rows, block_cols)"
        )
    return int(values.shape[1]), int(values.shape[2])


def _panel_cols(block_rows: int, block_cols: int, *, dtype: DType) -> int:
    """The panel width of the kernels for a shape; raises EngineError where there are none."""
    return (
        shipped_manifest()
        .find(block_rows=block_rows, block_cols=block_cols, dtype=dtype)
        .panel_cols
    )


def _check_in_features(in_features: int, *, block_cols: int) -> None:
    if in_features <= 0 or in_features % block_cols:
        raise ModelError(
            f"in_features is {in_features}, which is not a multiple of the block's {block_cols} "
            "columns: these blocks belong to another weight"
        )
    if in_features % 16:
        raise EngineError(
            f"in_features is {in_features}; the GPU kernels copy 16 inputs at a time and need a "
            "multiple of 16: export this layer dense"
        )


def _row_lengths(row_ptr: NDArray[Any], *, blocks: int) -> NDArray[np.int64]:
    """Blocks per block row, after checking the row pointers."""
    if row_ptr.ndim != 1 or len(row_ptr) < 2 or row_ptr.dtype.kind not in "iu":
        raise ModelError(
            f"row_ptr is {row_ptr.dtype} of shape {row_ptr.shape}; it must hold integers, one per "
            "block row and one more"
        )
    pointers = row_ptr.astype(np.int64)
    lengths = pointers[1:] - pointers[:-1]
    outside = (pointers < 0) | (pointers > blocks)  # their differences could wrap in 64 bits
    if row_ptr[0] != 0 or row_ptr[-1] != blocks or outside.any() or (lengths < 0).any():
        raise ModelError(
            f"row_ptr runs from {row_ptr[0]} to {row_ptr[-1]}, leaves that range in "
            f"{int(outside.sum())} places and falls in {int((lengths < 0).sum())} places; it must "
            f"rise from 0 to the {blocks} blocks"
        )
    return lengths


def _check_columns(
    col_idx: NDArray[Any], *, lengths: NDArray[np.int64], block_columns: int
) -> None:
    if col_idx.shape != (int(lengths.sum()),) or col_idx.dtype.kind not in "iu":
        raise ModelError(
            f"col_idx is {col_idx.dtype} of shape {col_idx.shape}; it must hold one integer for "
            f"each of the {int(lengths.sum())} blocks"
        )
    columns = col_idx.astype(np.int64)
    outside = (columns < 0) | (columns >= block_columns)
    if outside.any():
        raise ModelError(
            f"col_idx names block column {int(columns[outside][0])}; this weight has 0 to "
            f"{block_columns - 1}"
        )
    same_row = np.diff(np.repeat(np.arange(len(lengths)), lengths)) == 0
    if (np.diff(columns)[same_row] <= 0).any():
        raise ModelError(
            "col_idx does not rise within a block row; sort the blocks of each row by column and "
            "keep each position once"
        )


def _check_size(elements: int) -> None:
    if elements > INT32_MAX:
        raise EngineError(
            f"the packed weight has {elements} elements; the GPU kernels count in 32 bits, up to "
            f"{INT32_MAX}: split the layer"
        )


def _slots(lengths: NDArray[np.int64], *, first_segment: NDArray[np.int64]) -> NDArray[np.int64]:
    """The segment each block goes to."""
    starts = np.cumsum(lengths) - lengths
    offsets: NDArray[np.int64] = np.repeat(first_segment - starts, lengths)
    return np.arange(len(offsets)) + offsets


def _panels(bits: Bits, *, slots: NDArray[np.int64], shape: tuple[int, int]) -> Bits:
    """Segments (S, block_rows, block_cols) side by side in panels (panels, block_rows, 64)."""
    panels, segments = shape
    rows, cols = bits.shape[1:]
    out = np.zeros((panels * segments, rows, cols), np.uint16)
    out[slots] = bits
    side_by_side = out.reshape(panels, segments, rows, cols).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(side_by_side).reshape(panels, rows, segments * cols)


def _longest_first(first_panel: NDArray[np.int64], panels: NDArray[np.int64]) -> Indices:
    order = np.argsort(-panels, kind="stable")
    rows = np.zeros((len(order), 4), np.int32)
    rows[:, 0] = order
    rows[:, 1] = first_panel[order]
    rows[:, 2] = (first_panel + panels)[order]
    return rows


def _segment_columns(
    col_idx: NDArray[Any], *, slots: NDArray[np.int64], count: int, width: int
) -> Indices:
    columns = np.zeros(count, np.int32)
    columns[slots] = col_idx.astype(np.int64) * width
    return columns
