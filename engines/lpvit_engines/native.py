"""The native kernel, through ctypes: which instruction set runs, and packed layers.

The environment variable LPVIT_ISA (avx512, avx2, neon or portable) forces an instruction set for
float32. bfloat16 has one only: avx512_bf16.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.block_sparse import Activation, BlockSparseMatrix

INSTRUCTION_SETS = ("avx512", "avx2", "neon", "portable")  # best first
Precision = Literal["float32", "bf16"]
BF16_INSTRUCTION_SET = "avx512_bf16"
_ACTIVATIONS: dict[str, int] = {"none": 0, "gelu": 1}
INTERFACE = 2  # LPVIT_INTERFACE of native/layer.h
_FOLDER = Path(__file__).parent


class _Matrix(ctypes.Structure):
    """LpvitMatrix of native/layer.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("row_ptr", ctypes.c_void_p),
        ("col_idx", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_features", ctypes.c_int32),
        ("out_features", ctypes.c_int32),
        ("block_rows", ctypes.c_int32),
        ("block_cols", ctypes.c_int32),
        ("activation", ctypes.c_int32),
    )


class PackedLayer:
    """A block-sparse linear layer in the kernel's own layout; close() frees its memory.

    In bf16, weights and x are rounded to bfloat16 and the products added up in float32. `threads`
    is the address of a table of thread functions (tbb_threads()), or None to run on the calling
    thread. Raises EngineError for a bias or an activation that does not fit, and
    EnvironmentUnfitError where this machine has no instructions for the precision.
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
        self.in_features = matrix.in_features
        self.out_features = matrix.out_features
        self.pattern = f"{matrix.block_rows}x{matrix.block_cols}"
        self._library = library()
        self._handle = _create(self._library, matrix, bias, activation, self.isa)
        # run(x_address, tokens, out_address) is the call without checks: contiguous float32
        # (tokens, features) at both addresses. A partial adds no Python frame to the C call.
        is_bf16 = self.isa == BF16_INSTRUCTION_SET
        called = self._library.lpvit_run_prepared if is_bf16 else self._library.lpvit_run
        call = partial(called, ctypes.c_void_p(self._handle), ctypes.c_void_p(threads))
        self.run: Callable[[int, int, int], None] = (
            partial(_run_prepared, call) if is_bf16 else call
        )
        self.addresses = {
            "run": ctypes.cast(called, ctypes.c_void_p).value or 0,
            "layer": self._handle,
            "threads": threads or 0,
            "bf16": int(is_bf16),
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


def instruction_sets() -> tuple[str, ...]:
    """What this machine can run, best first."""
    return tuple(isa for isa in INSTRUCTION_SETS if library().lpvit_supports(isa.encode()))


def instruction_set(precision: Precision = "float32") -> str:
    """The one that new layers use: LPVIT_ISA where it is set, otherwise this machine's best.

    Raises EnvironmentUnfitError for one that this machine lacks.
    """
    if precision == "bf16":
        return _bf16_instruction_set()
    available = instruction_sets()
    forced = os.environ.get("LPVIT_ISA")
    if forced is None:
        if available == ("portable",):
            warnings.warn(
                "this processor has none of AVX-512, AVX2 and NEON: the sparse layers run on the "
                "portable kernel, several times slower than a tuned dense engine",
                RuntimeWarning,
                stacklevel=2,
            )
        return available[0]
    if forced not in available:
        raise EnvironmentUnfitError(
            f"LPVIT_ISA={forced}, but this machine runs: {', '.join(available)}. Choose one of "
            "these or unset LPVIT_ISA"
        )
    return forced


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


def fma_flops(rounds: int, *, precision: Precision = "float32") -> int:
    """Run multiply-adds on registers alone and return how many operations that were (2 each).

    Timed, it gives the peak of one core for the instruction set in use.
    """
    return int(library().lpvit_fma_loop(instruction_set(precision).encode(), rounds))


@cache
def library() -> Any:
    """The kernel's shared library, with argument types set.

    Raises EnvironmentUnfitError where it was never compiled.
    """
    loaded = _load("_block_sparse.so")
    loaded.lpvit_supports.argtypes = [ctypes.c_char_p]
    loaded.lpvit_create.argtypes = [ctypes.POINTER(_Matrix), ctypes.c_char_p]
    loaded.lpvit_create.restype = ctypes.c_void_p
    loaded.lpvit_destroy.argtypes = [ctypes.c_void_p]
    loaded.lpvit_destroy.restype = None
    loaded.lpvit_bytes.argtypes = [ctypes.c_void_p]
    loaded.lpvit_bytes.restype = ctypes.c_int64
    pointer = ctypes.c_void_p
    loaded.lpvit_run.argtypes = [pointer, pointer, pointer, ctypes.c_int64, pointer]
    loaded.lpvit_run.restype = None
    loaded.lpvit_run_prepared.argtypes = [*loaded.lpvit_run.argtypes, ctypes.c_int32]
    loaded.lpvit_run_prepared.restype = ctypes.c_int32
    loaded.lpvit_attention_kernel.argtypes = [ctypes.c_char_p, ctypes.c_int32]
    loaded.lpvit_attention_kernel.restype = pointer
    loaded.lpvit_attention.argtypes = [
        *(pointer, pointer, pointer, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32),
        *(ctypes.c_float, pointer),
    ]
    loaded.lpvit_attention.restype = ctypes.c_int32
    loaded.lpvit_fma_loop.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    loaded.lpvit_fma_loop.restype = ctypes.c_int64
    return loaded


@cache
def tbb_threads() -> int:
    """Address of the thread functions that run on the TBB workers already in this process.

    OpenVINO must have been imported before: its libtbb.so.12 is the one that is found. Raises
    EnvironmentUnfitError where no TBB is loaded or installed.
    """
    return ctypes.addressof(ctypes.c_char.in_dll(_load("_tbb_threads.so"), "lpvit_tbb_threads"))


def _load(name: str) -> ctypes.CDLL:
    path = _FOLDER / name
    if not path.is_file():
        raise EnvironmentUnfitError(
            f"{name} is not beside {_FOLDER.name}: the native kernel was never compiled. Install "
            "the package (pip install .), or in a checkout run: python hatch_build.py"
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentUnfitError(
            f"cannot load {name}: {error}. Compile it on this machine (python hatch_build.py in a "
            "checkout); _tbb_threads.so also needs OpenVINO to be imported first"
        ) from error
    refuse_stale(loaded, path)
    return loaded


def refuse_stale(loaded: ctypes.CDLL, path: Path) -> None:
    """EnvironmentUnfitError for a library that was compiled from other sources' interface."""
    found = loaded.lpvit_interface() if hasattr(loaded, "lpvit_interface") else None
    if found != INTERFACE:
        raise EnvironmentUnfitError(
            f"{path.name} has interface {found or 'of an older version'}, this package needs "
            f"{INTERFACE}: it was compiled from other sources and would compute nonsense. Install "
            "the package again (pip install .), or in a checkout run: python hatch_build.py"
        )


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
        _Matrix(
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
