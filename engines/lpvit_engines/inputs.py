"""The check that every engine makes of what it is handed."""

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError


def check_input(x: NDArray[np.float32], shape: tuple[int, ...], *, is_open: bool) -> None:
    """Raise EngineError unless x is float32 of that shape (-1: any size) and the engine is open."""
    if not is_open:
        raise EngineError("this engine is closed; load it again to infer")
    if x.dtype != np.float32:
        raise EngineError(f"the input is {x.dtype}; convert it: x.astype(numpy.float32)")
    fits = len(shape) == x.ndim and all(
        want in (-1, size) for want, size in zip(shape, x.shape, strict=True)
    )
    if not fits:
        raise EngineError(f"the input has shape {x.shape}; this model was compiled for {shape}")
