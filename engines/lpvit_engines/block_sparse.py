"""Block-sparse weights in numpy: the record, its validation, and a reference product.

A weight W (out_features, in_features) is cut into blocks of block_rows x block_cols; only the
stored ones are kept, block row after block row (BSR). A model file is untrusted, so every index is
checked before anything follows it.
"""

from dataclasses import dataclass
from math import erf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError

Activation = Literal["none", "gelu"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSparseMatrix:
    """A weight of shape (out_features, in_features), of which some blocks are stored.

    values: float32 (blocks, block_rows, block_cols); row_ptr: int32
    (out_features / block_rows + 1), the first block of each block row; col_idx: int32 (blocks), the
    block column of each block, increasing within a block row. Raises EngineError, naming the
    offset, where they do not fit together.
    """

    values: NDArray[np.float32]
    row_ptr: NDArray[np.int32]
    col_idx: NDArray[np.int32]
    in_features: int
    out_features: int

    def __post_init__(self) -> None:
        check_dtypes(self)
        check_shapes(self)
        check_row_ptr(self.row_ptr, blocks=self.blocks)
        check_col_idx(self.col_idx, self.row_ptr, block_columns=self.in_features // self.block_cols)

    @property
    def blocks(self) -> int:
        return int(self.values.shape[0])

    @property
    def block_rows(self) -> int:
        return int(self.values.shape[1])

    @property
    def block_cols(self) -> int:
        return int(self.values.shape[2])

    @property
    def density(self) -> float:
        """Stored weights as a fraction of all weights."""
        return float(self.values.size / (self.out_features * self.in_features))

    @classmethod
    def from_dense(
        cls, weight: NDArray[np.float32], *, block_rows: int, block_cols: int
    ) -> "BlockSparseMatrix":
        """Store the blocks of weight (out_features, in_features) that hold anything but zeros.

        Raises EngineError where the block does not divide the weight.
        """
        blocks = cut_into_blocks(weight, block_rows=block_rows, block_cols=block_cols)
        stored = (blocks != 0).any(axis=(2, 3))  # (block rows, block columns)
        row_ptr = np.concatenate([[0], np.cumsum(stored.sum(axis=1))])
        return cls(
            values=np.ascontiguousarray(blocks[stored], dtype=np.float32),
            row_ptr=row_ptr.astype(np.int32),
            col_idx=np.nonzero(stored)[1].astype(np.int32),
            in_features=weight.shape[1],
            out_features=weight.shape[0],
        )

    def to_dense(self) -> NDArray[np.float32]:
        """The weight (out_features, in_features), zeros included."""
        R, C = self.block_rows, self.block_cols
        grid = np.zeros((self.out_features // R, self.in_features // C, R, C), np.float32)
        grid[block_row_of_each(self.row_ptr), self.col_idx] = self.values
        return grid.transpose(0, 2, 1, 3).reshape(self.out_features, self.in_features)


def reference(
    x: NDArray[np.float32],
    matrix: BlockSparseMatrix,
    *,
    bias: NDArray[np.float32] | None = None,
    activation: Activation = "none",
) -> NDArray[np.float64]:
    """act(x W^T + bias) in float64: x (..., in_features) gives (..., out_features)."""
    y = x.astype(np.float64) @ matrix.to_dense().T.astype(np.float64)
    if bias is not None:
        y += bias
    if activation == "gelu":
        y *= 0.5 * (1.0 + np.vectorize(erf, otypes=[np.float64])(y / np.sqrt(2.0)))
    return y


def cut_into_blocks(
    weight: NDArray[np.float32], *, block_rows: int, block_cols: int
) -> NDArray[np.float32]:
    """A view (block rows, block columns, block_rows, block_cols) of a weight."""
    rows, columns = weight.shape
    if block_rows < 1 or block_cols < 1 or rows % block_rows or columns % block_cols:
        raise EngineError(
            f"a block of {block_rows}x{block_cols} does not divide a weight of {rows}x{columns} "
            "(out x in features): choose block rows that divide the out features and block columns "
            "that divide the in features"
        )
    grid = weight.reshape(rows // block_rows, block_rows, columns // block_cols, block_cols)
    return grid.transpose(0, 2, 1, 3)


def block_row_of_each(row_ptr: NDArray[np.int32]) -> NDArray[np.int64]:
    """The block row (blocks,) that each stored block belongs to."""
    return np.repeat(np.arange(row_ptr.size - 1), np.diff(row_ptr))


def check_dtypes(matrix: BlockSparseMatrix) -> None:
    expected = (("values", np.float32, 3), ("row_ptr", np.int32, 1), ("col_idx", np.int32, 1))
    for name, dtype, rank in expected:
        array = getattr(matrix, name)
        if array.dtype != dtype or array.ndim != rank:
            raise EngineError(
                f"{name} of a block-sparse weight is {array.dtype} of rank {array.ndim}; it must "
                f"be {np.dtype(dtype)} of rank {rank}. Export the model again"
            )


def check_shapes(matrix: BlockSparseMatrix) -> None:
    blocks, R, C = matrix.values.shape
    rows, columns = matrix.out_features, matrix.in_features
    if min(R, C, rows, columns) < 1 or rows % R or columns % C:
        raise EngineError(
            f"blocks of {R}x{C} do not divide a weight of {rows}x{columns} (out x in features). "
            "Any block is supported whose rows divide the out features and whose columns divide "
            "the in features"
        )
    if rows * columns >= 2**31:
        raise EngineError(
            f"a weight of {rows}x{columns} has 2^31 elements or more, too many for 32-bit indices"
        )
    if matrix.col_idx.size != blocks:
        raise EngineError(f"col_idx has {matrix.col_idx.size} entries for {blocks} stored blocks")
    if matrix.row_ptr.size != rows // R + 1:
        raise EngineError(
            f"row_ptr has {matrix.row_ptr.size} entries; {rows // R} block rows need "
            f"{rows // R + 1}"
        )


def check_row_ptr(row_ptr: NDArray[np.int32], *, blocks: int) -> None:
    """0 = row_ptr[0] <= row_ptr[1] <= ... = blocks."""
    if row_ptr[0] != 0:
        raise EngineError(f"row_ptr[0] is {row_ptr[0]}; it must be 0")
    falling = np.flatnonzero(row_ptr[1:] < row_ptr[:-1])
    if falling.size:
        at = int(falling[0]) + 1
        raise EngineError(f"row_ptr[{at}] is {row_ptr[at]}, below row_ptr[{at - 1}]")
    if row_ptr[-1] != blocks:
        at = row_ptr.size - 1
        raise EngineError(f"row_ptr[{at}] is {row_ptr[-1]}, but {blocks} blocks are stored")


def check_col_idx(
    col_idx: NDArray[np.int32], row_ptr: NDArray[np.int32], *, block_columns: int
) -> None:
    """0 <= col_idx < block_columns, and increasing within each block row (so nothing is twice)."""
    outside = np.flatnonzero((col_idx < 0) | (col_idx >= block_columns))
    if outside.size:
        at = int(outside[0])
        raise EngineError(
            f"col_idx[{at}] is {col_idx[at]}; there are {block_columns} block columns"
        )
    same_row = np.diff(block_row_of_each(row_ptr)) == 0
    falling = np.flatnonzero(same_row & (np.diff(col_idx.astype(np.int64)) <= 0))
    if falling.size:
        at = int(falling[0]) + 1
        raise EngineError(
            f"col_idx[{at}] is {col_idx[at]}, not above col_idx[{at - 1}] of the same block row"
        )
