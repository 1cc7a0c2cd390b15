"""The kernel's own C++ check, under AddressSanitizer and UBSan, and for NEON under qemu."""

import platform
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.native import neon_under_qemu
from tests.native.neon_under_qemu import build_script, check_neon, missing_tools, run_check

InstructionSet = tuple[str, int, int, list[str]]
SANITIZERS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 machine")
PORTABLE = ["portable_int8 equals float64 in 34 cases", "portable equals float64 in 44 cases"]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    pytest.importorskip("hatchling")
    return build_script()


def checked(done: "subprocess.CompletedProcess[str]") -> list[str]:
    """The lines that a check printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_portable_kernel_steps_nowhere_it_should_not(build: ModuleType, tmp_path: Path) -> None:
    sets: list[InstructionSet] = [("portable", 4, 2, [])]
    done = run_check(
        build,
        tmp_path,
        compiler=build.find_compiler(),
        sets=sets,
        flags=[*SANITIZERS, "-DLPVIT_ONLY_PORTABLE"],
    )
    assert checked(done) == PORTABLE


@ON_X86
def test_every_instruction_set_of_this_machine_steps_nowhere_it_should_not(
    build: ModuleType, tmp_path: Path
) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    compiler, sets = build.find_compiler(), build.INSTRUCTION_SETS["x86_64"]
    done = run_check(build, tmp_path, compiler=compiler, sets=sets, flags=SANITIZERS)
    expected = [
        ("avx512_bf16", 44, "avx512_bf16" in flags),
        ("avx512_vnni", 34, "avx512_vnni" in flags),
        ("avx512", 44, "avx512f" in flags),
        ("avx2_int8", 34, {"avx2", "fma"} <= set(flags)),
        ("avx2", 44, {"avx2", "fma"} <= set(flags)),
        ("portable_int8", 34, True),
        ("portable", 44, True),
    ]
    assert checked(done) == [
        f"{name} equals float64 in {n} cases" for name, n, is_here in expected if is_here
    ]


@ON_X86
def test_the_sixteen_lane_form_is_right_on_eight_lanes(build: ModuleType, tmp_path: Path) -> None:
    """What runs as AVX-512, source and tiling, compiled to pairs of AVX2 registers."""
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx2" not in flags or "avx512f" in flags:
        pytest.skip("for processors with AVX2 and without AVX-512, which runs as itself elsewhere")
    sets: list[InstructionSet] = [("portable", 16, 4, ["-mavx2", "-mfma", "-Wno-psabi"])]
    done = run_check(
        build,
        tmp_path,
        compiler=build.find_compiler(),
        sets=sets,
        flags=[*SANITIZERS, "-DLPVIT_ONLY_PORTABLE"],
    )
    assert checked(done) == PORTABLE


@pytest.mark.skipif(bool(missing_tools()), reason="needs g++-aarch64-linux-gnu and qemu-user")
def test_neon_equals_float64_under_qemu(build: ModuleType, tmp_path: Path) -> None:
    assert checked(check_neon(build, tmp_path)) == [
        "neon_dotprod equals float64 in 34 cases",
        "neon_int8 equals float64 in 34 cases",
        "neon equals float64 in 44 cases",
        *PORTABLE,
    ]


def test_the_script_for_neon_names_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="qemu-aarch64 not found: apt install"):
        neon_under_qemu.main()
