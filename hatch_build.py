"""Compile the native CPU kernel into plain shared libraries beside lpvit_engines' modules.

Hatchling calls this for every wheel, also an editable one and one made through an sdist. In a bare
checkout `python hatch_build.py` does the same in place. CXX chooses the compiler, CXXFLAGS adds to
its flags.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = "engines/native"
KERNEL_LIBRARY = "engines/lpvit_engines/_block_sparse.so"
THREADS_LIBRARY = "engines/lpvit_engines/_tbb_threads.so"
NODE_LIBRARY = "engines/lpvit_engines/_openvino_node.so"

COMMON = ["-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra"]
# Name, floats in a register, registers across the widest strip, flags of its own. Everything else
# is compiled for the plain baseline, so the library loads on every machine of the architecture.
InstructionSet = tuple[str, int, int, list[str]]
INSTRUCTION_SETS: dict[str, list[InstructionSet]] = {
    "x86_64": [
        ("portable", 4, 2, []),
        ("avx2", 8, 2, ["-mavx2", "-mfma"]),
        ("avx512", 16, 4, ["-mavx512f"]),
    ],
    "aarch64": [("portable", 4, 2, []), ("neon", 4, 4, [])],
    "": [("portable", 4, 2, [])],
}

# Kernels of narrower numbers, beside the instruction set that they extend: name, source, flags.
AVX512 = ["-mavx512bw", "-mavx512vl"]
NARROW_KERNELS: dict[str, list[tuple[str, str, list[str]]]] = {
    "portable": [("portable_int8", "kernel_int8", [])],
    "avx2": [("avx2_int8", "kernel_int8", [])],
    "avx512": [
        ("avx512_bf16", "kernel_bf16", [*AVX512, "-mavx512bf16"]),
        ("avx512_bf16_attention", "attention_bf16", [*AVX512, "-mavx512bf16"]),
        ("avx512_vnni", "kernel_int8", [*AVX512, "-mavx512vnni"]),
    ],
    "neon": [
        ("neon_int8", "kernel_int8", []),
        ("neon_dotprod", "kernel_int8", ["-march=armv8.2-a+dotprod"]),
    ],
}


class NativeKernel(BuildHookInterface):  # type: ignore[misc]
    """The hook that hatchling finds by this file's name; pyproject.toml asks for it in wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        build_native(Path(self.root))
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"  # ctypes loads the libraries: any Python 3 will do
        build_data["artifacts"] += [KERNEL_LIBRARY, THREADS_LIBRARY, NODE_LIBRARY]


def build_native(
    root: Path,
) -> list[Path]:
    """Compile the three libraries beside the package's modules; return their paths."""
    compiler = find_compiler()
    openvino = openvino_folder()
    kernel, threads, node = (
        root / name for name in (KERNEL_LIBRARY, THREADS_LIBRARY, NODE_LIBRARY)
    )
    machine = platform.machine()
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    sets = INSTRUCTION_SETS.get(machine, INSTRUCTION_SETS[""])
    build_kernel(compiler, root / NATIVE, kernel, sets=sets, flags=flags)
    build_threads(compiler, root / NATIVE, threads, openvino=openvino, flags=flags)
    build_node(compiler, root / NATIVE, node, openvino=openvino, flags=flags)
    return [kernel, threads, node]


def find_compiler() -> list[str]:
    """The C++ compiler as a command line: CXX, or the first of the usual names."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None:
        raise RuntimeError(
            "building lpvit-edge needs a C++17 compiler, and none of c++, g++, clang++ is on the "
            "PATH. Install one (Debian and Ubuntu: apt install g++), or name yours in CXX"
        )
    return [found]


def build_kernel(
    compiler: list[str],
    native: Path,
    target: Path,
    *,
    sets: list[InstructionSet],
    flags: list[str],
) -> None:
    """Objects per instruction set, each with its own flags, and the dispatchers."""
    flags = [*COMMON, *flags]
    with tempfile.TemporaryDirectory() as scratch:
        objects = [
            compile_object(compiler, flags, native / f"{part}.cpp", Path(scratch, f"{part}.o"))
            for part in ("layer", "packing", "attention")
        ]
        for name, lanes, widest, own in sets:
            macros = [f"-DLPVIT_ISA={name}", f"-DLPVIT_LANES={lanes}", f"-DLPVIT_WIDEST={widest}"]
            words = [*flags, *own, *macros]
            for part in ("kernel", "attention_tile"):
                compiled = Path(scratch, f"{part}-{name}.o")
                objects.append(compile_object(compiler, words, native / f"{part}.cpp", compiled))
            for narrow, part, extra in NARROW_KERNELS[name]:
                compiled = Path(scratch, f"{narrow}.o")
                more = [*words, *extra, f"-DLPVIT_INT8={narrow}"]
                objects.append(compile_object(compiler, more, native / f"{part}.cpp", compiled))
        command([*compiler, *flags, "-shared", *objects, "-o", str(target)])


def build_threads(
    compiler: list[str], native: Path, target: Path, *, openvino: Path, flags: list[str]
) -> None:
    """Link against an empty library that only bears TBB's soname.

    At run time that name finds the libtbb.so.12 which OpenVINO has loaded already, wherever it is.
    """
    include = f"-isystem{openvino / 'include'}"
    source = str(native / "tbb_threads.cpp")
    with tempfile.TemporaryDirectory() as scratch:
        stub, empty = Path(scratch, "libtbb.so.12"), Path(scratch, "empty.cpp")
        empty.write_text("")
        command([*compiler, "-shared", str(empty), "-Wl,-soname,libtbb.so.12", "-o", str(stub)])
        link = ["-Wl,--no-as-needed", str(stub), "-o", str(target)]
        command([*compiler, *COMMON, *flags, include, "-shared", source, *link])


def compile_object(compiler: list[str], flags: list[str], source: Path, target: Path) -> str:
    command([*compiler, *flags, "-fvisibility=hidden", "-c", str(source), "-o", str(target)])
    return str(target)


def build_node(
    compiler: list[str], native: Path, target: Path, *, openvino: Path, flags: list[str]
) -> None:
    """Link against the versioned libopenvino.so.NNNN, so that no other version loads it."""
    library = next((openvino / "libs").glob("libopenvino.so.*"))
    include = f"-isystem{openvino / 'include'}"
    source = str(native / "openvino_node.cpp")
    words = [*compiler, *COMMON, *flags, include, "-shared", source, str(library)]
    command([*words, "-o", str(target)])


def openvino_folder() -> Path:
    """OpenVINO's package folder: its wheels carry their own headers and those of their TBB."""
    try:
        files = distribution("openvino").files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.as_posix() == "openvino/include/tbb/parallel_for.h":
            return Path(str(file.locate())).resolve().parents[2]
    raise RuntimeError(
        "building lpvit-edge needs the headers in OpenVINO's wheel, and no openvino with headers "
        "is installed beside this Python. Install one: pip install 'openvino>=2026.0'"
    )


def command(words: list[str]) -> None:
    """Run one compiler command; its output is the error's text where it fails."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the compiler failed: {shlex.join(words)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    for library in build_native(Path(__file__).resolve().parent):
        sys.stdout.write(f"{library}\n")
