"""The kernel's own C++ check, under AddressSanitizer and UBSan, and for NEON under qemu."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

InstructionSet = tuple[str, int, int, list[str]]
ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "engines" / "native"
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")
CROSS = "aarch64-linux-gnu-g++"
PORTABLE = ["portable_int8 equals float64 in 34 cases", "portable equals float64 in 44 cases"]
HAS_QEMU = shutil.which(CROSS) is not None and shutil.which("qemu-aarch64") is not None


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    """hatch_build.py as a module; it lies outside the packages."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hatch_build"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["hatch_build"]


def run_check(
    build: ModuleType,
    folder: Path,
    *,
    compiler: list[str],
    sets: list[InstructionSet],
    flags: list[str],
    runner: tuple[str, ...] = (),
) -> list[str]:
    """Build the library and the check, run it, and return the lines it prints."""
    library, program = folder / "_block_sparse.so", folder / "check_kernel"
    build.build_kernel(compiler, NATIVE, library, sets=sets, flags=flags)
    source = str(ROOT / "tests" / "native" / "check_kernel.cpp")
    link = [str(library), f"-Wl,-rpath,{folder}", "-o", str(program)]
    build.command([*compiler, *build.COMMON, *flags, f"-I{NATIVE}", source, *link])
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_portable_kernel_steps_nowhere_it_should_not(build: ModuleType, tmp_path: Path) -> None:
    sets: list[InstructionSet] = [("portable", 4, 2, [])]
    lines = run_check(
        build,
        tmp_path,
        compiler=build.find_compiler(),
        sets=sets,
        flags=[*SANITIZERS, "-DLPVIT_ONLY_PORTABLE"],
    )
    assert lines == PORTABLE


@ON_X86
def test_every_instruction_set_of_this_machine_steps_nowhere_it_should_not(
    build: ModuleType, tmp_path: Path
) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    compiler, sets = build.find_compiler(), build.INSTRUCTION_SETS["x86_64"]
    lines = run_check(build, tmp_path, compiler=compiler, sets=sets, flags=SANITIZERS)
    expected = [
        ("avx512_bf16", 44, "avx512_bf16" in flags),
        ("avx512_vnni", 34, "avx512_vnni" in flags),
        ("avx512", 44, "avx512f" in flags),
        ("avx2_int8", 34, {"avx2", "fma"} <= set(flags)),
        ("avx2", 44, {"avx2", "fma"} <= set(flags)),
        ("portable_int8", 34, True),
        ("portable", 44, True),
    ]
    assert lines == [
        f"{name} equals float64 in {n} cases" for name, n, is_here in expected if is_here
    ]


@ON_X86
def test_the_sixteen_lane_form_is_right_on_eight_lanes(build: ModuleType, tmp_path: Path) -> None:
    """What runs as AVX-512, source and tiling, compiled to pairs of AVX2 registers."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx2" not in flags or "avx512f" in flags:
        pytest.skip("for processors with AVX2 and without AVX-512, which runs as itself elsewhere")
    sets: list[InstructionSet] = [("portable", 16, 4, ["-mavx2", "-mfma", "-Wno-psabi"])]
    lines = run_check(
        build,
        tmp_path,
        compiler=build.find_compiler(),
        sets=sets,
        flags=[*SANITIZERS, "-DLPVIT_ONLY_PORTABLE"],
    )
    assert lines == PORTABLE


@pytest.mark.skipif(not HAS_QEMU, reason="needs g++-aarch64-linux-gnu and qemu-user")
def test_neon_equals_float64_under_qemu(build: ModuleType, tmp_path: Path) -> None:
    lines = run_check(
        build,
        tmp_path,
        compiler=[CROSS],
        sets=build.INSTRUCTION_SETS["aarch64"],
        flags=[],
        runner=("qemu-aarch64", "-L", os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu")),
    )
    assert lines == [
        "neon_dotprod equals float64 in 34 cases",
        "neon_int8 equals float64 in 34 cases",
        "neon equals float64 in 44 cases",
        *PORTABLE,
    ]
