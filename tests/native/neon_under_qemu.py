"""The NEON kernels, compiled for aarch64 and compared with float64 on an ARM processor in software.

    python tests/native/neon_under_qemu.py

Needs hatchling and, of Debian and Ubuntu, the packages g++-aarch64-linux-gnu and qemu-user.
QEMU_LD_PREFIX names the folder of aarch64's libraries where it is not /usr/aarch64-linux-gnu.
Prints a line for each instruction set; ends with 1 and the difference where one is not equal.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "engines" / "native"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def main() -> int:
    absent = missing_tools()
    if absent:
        sys.exit(f"{' and '.join(absent)} not found: apt install g++-aarch64-linux-gnu qemu-user")
    with tempfile.TemporaryDirectory() as folder:
        done = check_neon(build_script(), Path(folder))
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    return done.returncode


def missing_tools() -> list[str]:
    return [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]


def build_script() -> ModuleType:
    """hatch_build.py as a module; it lies outside the packages."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_neon(build: Any, folder: Path) -> "subprocess.CompletedProcess[str]":
    libraries = os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu")
    return run_check(
        build,
        folder,
        compiler=[COMPILER],
        sets=build.INSTRUCTION_SETS["aarch64"],
        runner=(EMULATOR, "-L", libraries),
    )


def run_check(
    build: Any,
    folder: Path,
    *,
    compiler: list[str],
    sets: list[tuple[str, int, int, list[str]]],
    flags: Sequence[str] = (),
    runner: tuple[str, ...] = (),
) -> "subprocess.CompletedProcess[str]":
    """Build the kernel's library and check_kernel.cpp in `folder`, and run it."""
    library, program = folder / "_block_sparse.so", folder / "check_kernel"
    build.build_kernel(compiler, NATIVE, library, sets=sets, flags=list(flags))
    source = str(Path(__file__).with_name("check_kernel.cpp"))
    link = [str(library), f"-Wl,-rpath,{folder}", "-o", str(program)]
    build.command([*compiler, *build.COMMON, *flags, f"-I{NATIVE}", source, *link])
    return subprocess.run([*runner, str(program)], capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
