"""The TensorRT package against the real Python bindings of four releases, and both numpys.

Nothing is computed: the libraries under the bindings are a stub. What holds here: every class,
member, argument and enum value that the package uses exists in each release, the plugin and the
listeners take and give TensorRT's own objects.
"""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.fake_driver import compile_fake_driver
from tests.trt import bindings
from tests.trt.uses import FORBIDDEN, forbidden, package_uses

ROOT = Path(__file__).parents[1]
CHECK = Path(__file__).with_name("trt") / "check.py"
NUMPYS = ("1.26", "2")
MATRIX = [(version, numpy) for version in bindings.BINDINGS for numpy in NUMPYS]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.version_info[:2] != (3, 11):
        bindings.give_up("the bindings of the contract are those for Python 3.11")
    return bindings.stub_libraries(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_driver(tmp_path_factory.mktemp("driver"), source="fake_runtime.c")


@lru_cache
def checked(version: str, numpy: str, libraries: Path, driver: Path) -> dict[str, Any]:
    """What check.py found under one release and one numpy, in a process of its own."""
    path = [bindings.unpacked(bindings.BINDINGS[version])]
    if numpy == "1.26":
        path.append(bindings.unpacked(bindings.OLD_NUMPY))
    return run_check(package_uses(), path, libraries, driver)


def run_check(
    uses: list[dict[str, object]], path: list[Path], libraries: Path, driver: Path
) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(CHECK)],
        input=json.dumps({"uses": uses, "library": str(driver)}),
        env={
            **os.environ,
            "PYTHONPATH": ":".join(map(str, [*path, ROOT, ROOT / "engines"])),
            "LD_LIBRARY_PATH": str(libraries),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # bindings may talk before
    return found


@pytest.fixture(params=MATRIX, ids=[f"{version}-numpy{numpy}" for version, numpy in MATRIX])
def found(request: pytest.FixtureRequest, libraries: Path, driver: Path) -> dict[str, Any]:
    return checked(*request.param, libraries, driver)


def test_every_use_exists_in_every_release(found: dict[str, Any]) -> None:
    assert found["problems"] == []


def test_what_tensorrt_will_call_takes_its_arguments(found: dict[str, Any]) -> None:
    assert found["overridden"] == []


def test_plugin_and_listeners_work_with_tensorrts_own_objects(found: dict[str, Any]) -> None:
    assert found["failures"] == []


def test_a_numpy_that_the_bindings_corrupt_is_refused(found: dict[str, Any]) -> None:
    corrupts = found["numpy"].startswith("2") and found["version"] in ("10.3.0", "10.13.3.9")
    if corrupts:
        assert "reads [7, 8, 9] as [7, 7, 7] under numpy 2" in found["judged"]
        assert "pip install 'numpy<2'" in found["judged"]
    else:
        assert found["judged"] == "ok"


def test_the_uses_are_really_read_off_the_sources() -> None:
    uses = {(use["class"], use["member"], use["kind"]) for use in package_uses()}
    for expected in (
        ("Builder", "build_serialized_network", "call"),
        ("IExecutionContext", "execute_async_v3", "call"),
        ("IBuilderConfig", "progress_monitor", "write"),
        ("BuilderFlag", "SPARSE_WEIGHTS", "enum"),
        ("OnnxParser", "num_errors", "read"),
        ("IPluginRegistry", "register_creator", "call"),
        ("ParserError", "node_name", "call"),
        ("ITimingCache", "combine", "call"),
        ("IExprBuilder", "constant", "call"),
    ):
        assert expected in uses


def test_nothing_that_tensorrt_took_away_is_used() -> None:
    assert FORBIDDEN
    assert forbidden() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"class": "Builder", "member": "create_network", "kind": "call", "positional": 3},
        {"class": "IExecutionContext", "member": "execute_v2", "kind": "read"},
        {"class": "BuilderFlag", "member": "FP17", "kind": "enum"},
        {"class": "ICudaEngine", "member": "num_io_tensors", "kind": "write"},
    ],
)
def test_a_wrong_use_would_be_found(wrong: dict[str, Any], libraries: Path, driver: Path) -> None:
    use = {"file": "x.py", "line": 1, "positional": 0, "keywords": [], **wrong}
    found = run_check(
        [use], [bindings.unpacked(bindings.BINDINGS["11.4.0.106"])], libraries, driver
    )
    assert len(found["problems"]) == 1
