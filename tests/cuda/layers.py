"""Random block-sparse layers, what they must compute, and how far a kernel may be from it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_engines.cuda.half import Bits, from_bits, to_bits
from lpvit_engines.cuda.manifest import DType, Epilogue
from lpvit_engines.cuda.packing import PackedWeight, pack

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer to compute. Its second block row is empty; keep = 0 empties all of them."""

    block_rows: int
    block_cols: int
    dtype: DType = "float16"
    epilogue: Epilogue = "none"
    tokens: int = 197
    in_features: int = 256
    block_row_count: int = 3
    keep: float = 0.4
    seed: int = 0

    def __str__(self) -> str:
        shape = f"{self.block_rows}x{self.block_cols}"
        return f"{shape}-{self.dtype}-{self.epilogue}-M{self.tokens}-keep{self.keep}"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Bit patterns as the kernel gets them, and the result in float64."""

    x: Bits
    bias: Bits
    residual: Bits
    packed: PackedWeight
    expected: NDArray[np.float64]


def blocks_of(case: Case) -> tuple[Array, Array, Array]:
    """values, row_ptr, col_idx of a random weight."""
    rng = np.random.default_rng(case.seed)
    mask = rng.random((case.block_row_count, case.in_features // case.block_cols)) < case.keep
    mask[1] = False
    row_ptr = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    col_idx = mask.nonzero()[1].astype(np.int32)
    shape = (len(col_idx), case.block_rows, case.block_cols)
    return rng.standard_normal(shape) * 0.05, row_ptr, col_idx


def dense(values: Array, row_ptr: Array, col_idx: Array, *, in_features: int) -> Array:
    """The weight (out_features, in_features) that blocks stand for, block by block."""
    _, rows, cols = values.shape
    weight = np.zeros(((len(row_ptr) - 1) * rows, in_features), values.dtype)
    for row in range(len(row_ptr) - 1):
        for block in range(row_ptr[row], row_ptr[row + 1]):
            column = col_idx[block] * cols
            weight[row * rows : (row + 1) * rows, column : column + cols] = values[block]
    return weight


def layer(case: Case) -> Layer:
    """A layer with its result, computed densely in float64 from the rounded inputs."""
    values, row_ptr, col_idx = blocks_of(case)
    rng = np.random.default_rng(case.seed + 1)
    out_features = case.block_row_count * case.block_rows
    x, bias, residual = (
        to_bits(rng.standard_normal(shape), dtype=case.dtype)
        for shape in (
            (case.tokens, case.in_features),
            (out_features,),
            (case.tokens, out_features),
        )
    )
    rounded = _exact(to_bits(values, dtype=case.dtype), case.dtype)
    weight = dense(rounded, row_ptr, col_idx, in_features=case.in_features)
    sums = _exact(x, case.dtype) @ weight.T + _exact(bias, case.dtype)
    return Layer(
        x=x,
        bias=bias,
        residual=residual,
        packed=pack(values, row_ptr, col_idx, in_features=case.in_features, dtype=case.dtype),
        expected=_epilogue(sums, case.epilogue, residual=_exact(residual, case.dtype)),
    )


def _exact(bits: Bits, dtype: DType) -> NDArray[np.float64]:
    return from_bits(bits, dtype=dtype).astype(np.float64)


def _epilogue(sums: Array, epilogue: Epilogue, *, residual: Array) -> NDArray[np.float64]:
    if epilogue == "gelu":
        return np.asarray(sums * 0.5 * (1 + np.vectorize(math.erf)(sums / math.sqrt(2))))
    return np.asarray(sums + residual if epilogue == "residual" else sums)


def assert_close(
    found: Bits, case: Case, expected: NDArray[np.float64], *, truncates: bool = False
) -> None:
    """The result is half a unit in the last place of its format away, plus float32 summation.

    Half a unit is 2^-11 of a float16 and 2^-8 of a bfloat16 (10 and 7 bits of mantissa, and the
    leading one). A sum of up to 256 products near 0.05 in float32 is good to 1e-4, and GELU's erfc
    approximation to 1.5e-7 of x. truncates allows for a result cut off instead of rounded.
    """
    numbers = _exact(found, case.dtype)
    unit = 2**-11 if case.dtype == "float16" else 2**-8
    allowed = np.abs(expected) * unit * (2 if truncates else 1) + 1e-4
    error = np.abs(numbers - expected)
    assert (error <= allowed).all(), f"{case}: off by up to {np.nanmax(error):.3g}"
