"""The compiled kernel, through ctypes: its functions, and those that run it on OpenVINO's pool."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

from lpvit_edge.errors import EnvironmentUnfitError

INTERFACE = 3  # LPVIT_INTERFACE of native/layer.h
_FOLDER = Path(__file__).parent


class Matrix(ctypes.Structure):
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


@cache
def library() -> Any:
    """The kernel's shared library, with argument types set.

    Raises EnvironmentUnfitError where it was never compiled.
    """
    loaded = _load("_block_sparse.so")
    loaded.lpvit_supports.argtypes = [ctypes.c_char_p]
    loaded.lpvit_create.argtypes = [ctypes.POINTER(Matrix), ctypes.c_char_p]
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
