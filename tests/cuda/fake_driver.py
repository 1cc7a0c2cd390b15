"""The fake CUDA driver, compiled once, and its state as a ctypes structure."""

import ctypes
import shutil
import subprocess
from ctypes import c_char, c_int, c_ubyte, c_uint, c_uint64
from pathlib import Path
from typing import ClassVar

import pytest

_OUR_SIZES = (8,) * 6 + (4,) * 3 + (8,) * 3  # the kernel's parameter list, read off its PTX


class State(ctypes.Structure):
    """Mirrors struct state of fake_driver.c."""

    _fields_: ClassVar = [
        ("capability", c_int), ("shared_limit", c_int), ("driver_version", c_int),
        ("init_result", c_int), ("context_result", c_int), ("cubin_result", c_int),
        ("ptx_result", c_int), ("launch_result", c_int), ("attribute_result", c_int),
        ("parameter_count", c_int), ("parameter_sizes", c_int * 32),
        ("cubin_loads", c_int), ("ptx_loads", c_int), ("unloads", c_int), ("launches", c_int),
        ("shared_attribute", c_int), ("ptx_length", c_int), ("entry", c_char * 64),
        ("grid", c_uint * 3), ("block", c_uint * 3), ("shared_bytes", c_uint),
        ("stream", c_uint64), ("parameter_bytes", c_int), ("parameters", c_ubyte * 256),
    ]  # fmt: skip


def compile_fake_driver(folder: Path, *, source: str = "fake_driver.c") -> Path:
    """Compile the fake into a folder; skips the test where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler to build the fake CUDA driver with")
    library = folder / "libfakecuda.so"
    text = Path(__file__).with_name(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", str(text), "-o", str(library)], check=True)
    return library


def state_of(library: Path | str) -> State:
    """The state, as of a Jetson AGX Orin under JetPack 6 on which nothing has run."""
    state = State.in_dll(ctypes.CDLL(str(library)), "fake")
    ctypes.memset(ctypes.addressof(state), 0, ctypes.sizeof(state))
    state.capability, state.shared_limit, state.driver_version = 87, 163 * 1024, 12060
    state.parameter_count = len(_OUR_SIZES)
    for index, size in enumerate(_OUR_SIZES):
        state.parameter_sizes[index] = size
    return state
