"""The driver through NVIDIA's cuda-bindings does what it does through ctypes, call by call."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lpvit_engines.cuda import driver
from tests.cuda.fake_driver import compile_fake_driver
from tests.trt import bindings

ROOT = Path(__file__).parents[1]
# For JetPack 6 and 7; the package it finds libraries with is common to both.
RELEASES = ("12.9.10", "13.2.0")
PATHFINDER = "cuda-pathfinder==1.9.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libcuda.so.1 is the fake driver."""
    folder = tmp_path_factory.mktemp("libcuda")
    shutil.move(compile_fake_driver(folder, source="fake_proc_address.c"), folder / driver.LIBRARY)
    return folder


def every_call(folder: Path, *packages: Path, fails: tuple[str, ...] = ()) -> dict[str, Any]:
    """What every_call.py found, through cuda-bindings where `packages` has it."""
    library = driver.LIBRARY if packages else str(folder / driver.LIBRARY)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/cuda/every_call.py"), library, *fails],
        env={
            **os.environ,
            "PYTHONPATH": ":".join(map(str, [*packages, ROOT, ROOT / "engines"])),
            "LD_LIBRARY_PATH": str(folder),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    found["calls"] = re.sub(r"0x[0-9a-f]{6,}", "MEMORY", found["calls"])
    return found


@pytest.fixture(params=RELEASES)
def packages(request: pytest.FixtureRequest) -> tuple[Path, ...]:
    if sys.version_info[:2] != (3, 11):
        bindings.give_up("the packages of this contract are those for Python 3.11")
    names = (f"cuda-bindings=={request.param}", PATHFINDER)
    return tuple(bindings.unpacked(name) for name in names)


def test_calls_answers_and_launch_are_those_of_ctypes(
    folder: Path, packages: tuple[Path, ...]
) -> None:
    through_ctypes, found = every_call(folder), every_call(folder, *packages)
    assert through_ctypes.pop("through") == "ctypes"
    assert found.pop("through") == packages[0].name.replace("cuda-bindings-", "cuda-bindings ")
    assert found == through_ctypes
    assert found["live"] == 0
    assert found["launch"][:2] == [1, 0x77]
    assert "cuGraphLaunch" in found["calls"]


@pytest.mark.parametrize(
    ("call", "result"), [("cuMemAlloc", "2"), ("cuStreamCreate", "719"), ("cuGraphLaunch", "700")]
)
def test_a_failure_is_the_same_error_in_words(
    folder: Path, packages: tuple[Path, ...], call: str, result: str
) -> None:
    found = every_call(folder, *packages, fails=(call, result))
    assert found["answers"].startswith(f"EngineError: {call}")
    assert f"answered CUresult {result}: " in found["answers"]
    assert found["answers"] == every_call(folder, fails=(call, result))["answers"]


def test_bindings_without_a_driver_leave_the_words_to_ctypes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Module:
        @staticmethod
        def cuInit(_: int) -> tuple[int]:  # noqa: N802
            raise RuntimeError("Failure finding libcuda.so")

    monkeypatch.setattr(driver, "find_bindings", Module)
    monkeypatch.setitem(sys.modules, "cuda", type(sys)("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", type(sys)("cuda.bindings"))
    assert driver._through_bindings() is None
    monkeypatch.setattr(driver, "find_bindings", lambda: None)
    assert driver._through_bindings() is None
