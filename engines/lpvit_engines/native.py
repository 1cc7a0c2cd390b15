"""The native kernel: which instruction set runs, and packed layers.

The environment variable LPVIT_ISA (avx512, avx2, neon or portable) forces an instruction set for
float32 and int8. bfloat16 has one only: avx512_bf16.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.block_sparse import Activation, BlockSparseMatrix
from lpvit_engines.native_library import Matrix, library

INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")  # best first
Precision = Literal["float32", "bf16", "int8"]
BF16_INSTRUCTION_SET = "avx512_bf16"
# Best first, each with the name that forces it; NEON has two.
INT8_INSTRUCTION_SETS = {
    "avx512_vnni": "avx512",
    "avx2_int8": "avx2",
    "neon_dotprod": "neon",
    "neon_int8": "neon",
    "portable_int8": "portable",
}
# Of the portable kernel against AVX2's in DeiT-B's fc1, 64x1 at 50 %, on one Zen 4 core: 14.4 ms
# against 4.5 in float32, 18.3 against 2.5 in int8 (time_layer of benchmarks/layer_roofline.py).
PORTABLE_SLOWDOWN = {"float32": 3, "int8": 7}
# 255 * 127 * this many features still fits an int32 sum.
INT8_MOST_FEATURES = 65_536
_ACTIVATIONS: dict[str, int] = {"none": 0, "gelu": 1}


class PackedLayer:
    """A block-sparse linear layer in the kernel's own layout; close() frees its memory.

    In bf16, weights and x are rounded to bfloat16 and the products added up in float32. In int8
    each output's weights have a scale, each token's x a scale and a zero point, taken from its own
    numbers in every call; integers are added up exactly, and bias and activation are float32.

    `threads` is the address of a table of thread functions (tbb_threads()), or None to run on the
    calling thread. Raises EngineError for a bias or an activation that does not fit, for more than
    INT8_MOST_FEATURES input features in int8, and EnvironmentUnfitError where this machine has no
    instructions for the precision.
    """

    def __init__(
        self,
        matrix: BlockSparseMatrix,
        *,
        bias: NDArray[np.float32] | None = None,
        activation: Activation = "none",
        threads: int | None = None,
        isa: str | None = None,
        precision: Precision = "float32",
    ) -> None:
        self._handle = None
        self.isa = isa or instruction_set(precision)
        if self.isa in INT8_INSTRUCTION_SETS and matrix.in_features > INT8_MOST_FEATURES:
            raise EngineError(
                f"{matrix.in_features} input features: in int8 a sum over more than "
                f"{INT8_MOST_FEATURES} may leave 32 bits. Run this layer in float32"
            )
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        is_dense = matrix.block_cols == matrix.in_features and matrix.density == 1
        self.pattern = "dense" if is_dense else f"block {matrix.block_rows}x{matrix.block_cols}"
        self._library = library()
        self._handle = _create(self._library, matrix, bias, activation, self.isa)
        # run(x_address, tokens, out_address) is the call without checks: contiguous float32
        # (tokens, features) at both addresses. A partial adds no Python frame to the C call.
        is_prepared = self.isa not in INSTRUCTION_SETS  # which copies x first
        called = self._library.lpvit_run_prepared if is_prepared else self._library.lpvit_run
        call = partial(called, ctypes.c_void_p(self._handle), ctypes.c_void_p(threads))
        self.run: Callable[[int, int, int], None] = (
            partial(_run_prepared, call) if is_prepared else call
        )
        self.addresses = {
            "run": ctypes.cast(called, ctypes.c_void_p).value or 0,
            "layer": self._handle,
            "threads": threads or 0,
            "prepared": int(is_prepared),
        }

    def __call__(self, x: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Write act(x W^T + bias) to out; x (..., in_features), out (..., out_features)."""
        if not (x.dtype == out.dtype == np.float32 and x.flags.c_contiguous):
            raise EngineError(f"x is {x.dtype}, out {out.dtype}; both must be contiguous float32")
        if not out.flags.c_contiguous or not out.flags.writeable:
            raise EngineError("out must be contiguous and writeable")
        if x.shape[-1] != self.in_features or out.shape != (*x.shape[:-1], self.out_features):
            raise EngineError(
                f"x {x.shape} and out {out.shape} do not fit a layer of {self.in_features} in and "
                f"{self.out_features} out features"
            )
        self.run(x.ctypes.data, x.size // self.in_features, out.ctypes.data)

    @property
    def memory_bytes(self) -> int:
        """Bytes of packed weights, padding included."""
        return int(self._library.lpvit_bytes(self._handle))

    def close(self) -> None:
        """Free the packed weights. A later call is an error."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self.run = _closed
            self._library.lpvit_destroy(handle)

    def __enter__(self) -> "PackedLayer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def instruction_sets(precision: Precision = "float32") -> tuple[str, ...]:
    """What this machine can run in float32 or int8, best first."""
    names = INT8_INSTRUCTION_SETS if precision == "int8" else INSTRUCTION_SETS
    return tuple(isa for isa in names if library().lpvit_supports(isa.encode()))


def instruction_set(precision: Precision = "float32") -> str:
    """The one that new layers use: LPVIT_ISA where it is set, otherwise this machine's best.

    Raises EnvironmentUnfitError for one that this machine lacks.
    """
    if precision == "bf16":
        return _bf16_instruction_set()
    available = instruction_sets(precision)
    forced = os.environ.get("LPVIT_ISA")
    if forced is None:
        if available[0].startswith("portable"):
            warnings.warn(
                "this processor has none of AVX-512, AVX2 and NEON: the sparse layers run on the "
                f"portable kernel, which takes about {PORTABLE_SLOWDOWN[precision]} times as long "
                "as AVX2's. `lpvit check` measures whether a sparse network still gains here",
                RuntimeWarning,
                stacklevel=2,
            )
        return available[0]
    names = {INT8_INSTRUCTION_SETS.get(isa, isa): isa for isa in reversed(available)}
    if forced not in names:
        raise EnvironmentUnfitError(
            f"LPVIT_ISA={forced}, but this machine runs {precision} on: "
            f"{', '.join(reversed(names))}. Choose one of these or unset LPVIT_ISA"
        )
    return names[forced]


def _bf16_instruction_set() -> str:
    forced = os.environ.get("LPVIT_ISA")
    if forced is not None:
        raise EnvironmentUnfitError(
            f"LPVIT_ISA={forced} forces an instruction set without bfloat16. Unset it, or run in "
            "float32"
        )
    if not library().lpvit_supports(BF16_INSTRUCTION_SET.encode()):
        raise EnvironmentUnfitError(
            "bf16 needs AVX512_BF16 (AMD from Zen 4, Intel Xeon from Cooper Lake), which this "
            "processor lacks: without it bfloat16 would be slower than float32. Run in float32"
        )
    return BF16_INSTRUCTION_SET


def fma_flops(rounds: int, *, precision: Precision = "float32", isa: str | None = None) -> int:
    """Run multiply-adds on registers alone and return how many operations that were (2 each).

    Timed, it gives the peak of one core for the instruction set in use.
    """
    return int(library().lpvit_fma_loop((isa or instruction_set(precision)).encode(), rounds))


def _create(
    loaded: Any,
    matrix: BlockSparseMatrix,
    bias: NDArray[np.float32] | None,
    activation: str,
    isa: str,
) -> int:
    if activation not in _ACTIVATIONS:
        raise EngineError(
            f"no activation {activation!r} in the kernel; there are: {', '.join(_ACTIVATIONS)}"
        )
    if bias is not None and (bias.dtype != np.float32 or bias.shape != (matrix.out_features,)):
        raise EngineError(
            f"the bias is {bias.dtype} of shape {bias.shape}; it must be float32 of shape "
            f"({matrix.out_features},)"
        )
    arrays = (matrix.values, matrix.row_ptr, matrix.col_idx, bias)
    held = [None if a is None else np.ascontiguousarray(a) for a in arrays]
    handle = loaded.lpvit_create(
        Matrix(
            *(None if a is None else a.ctypes.data for a in held),
            matrix.in_features,
            matrix.out_features,
            matrix.block_rows,
            matrix.block_cols,
            _ACTIVATIONS[activation],
        ),
        isa.encode(),
    )
    if handle is None:
        raise EngineError(
            f"cannot pack a layer of {matrix.out_features}x{matrix.in_features} for {isa}: no "
            f"memory, or this machine lacks {isa}"
        )
    return int(handle)


def _run_prepared(call: Any, x_address: int, tokens: int, out_address: int) -> None:
    """From and to float32, element 0 of native/layer.h."""
    if call(x_address, tokens, out_address, 0):
        raise EngineError(f"no memory for a copy of {tokens} tokens; free some and run again")


def _closed(_x_address: int, _tokens: int, _out_address: int) -> None:
    raise EngineError("this layer is closed: its weights were freed")
