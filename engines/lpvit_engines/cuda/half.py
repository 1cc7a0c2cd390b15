"""Half-precision numbers as bit patterns: numpy has no bfloat16, and the kernels read bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import ModelError
from lpvit_engines.cuda.manifest import DType

Bits = NDArray[np.uint16]
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}


def to_bits(array: NDArray[Any], *, dtype: DType) -> Bits:
    """Round to the nearest half, ties to even; returns bit patterns of the same shape.

    Raises ModelError for a value that is not finite, before or after rounding: a kernel multiplies
    padding by zero, and zero times infinity would spread NaN over a whole row.
    """
    single = np.asarray(array, dtype=np.float32)
    with np.errstate(over="ignore"):
        bits = _float16(single) if dtype == "float16" else _bfloat16(single)
    special = (bits & _EXPONENT[dtype]) == _EXPONENT[dtype]
    if special.any():
        first = float(single[special].flat[0])
        raise ModelError(
            f"{int(special.sum())} weights, the first {first:g}, are not finite in {dtype}. "
            "Look for NaN in the checkpoint, or use bfloat16, which reaches 3.4e38"
        )
    return bits


def from_bits(bits: Bits, *, dtype: DType) -> NDArray[np.float32]:
    """The numbers behind bit patterns, exactly."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _float16(single: NDArray[np.float32]) -> Bits:
    return single.astype(np.float16).view(np.uint16)


def _bfloat16(single: NDArray[np.float32]) -> Bits:
    wide = np.ascontiguousarray(single).view(np.uint32)
    if np.isnan(single).any():  # rounding could carry a NaN into infinity or past the sign
        return np.full(single.shape, _EXPONENT["bfloat16"], np.uint16)
    to_even = np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
    return ((wide + to_even) >> np.uint32(16)).astype(np.uint16)
