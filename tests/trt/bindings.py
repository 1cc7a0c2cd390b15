"""TensorRT's real Python bindings, downloaded once, over a stub of its libraries.

Four wheels of 1.1 to 1.3 MB each, without TensorRT itself, and numpy 1.26 (18 MB). They are kept in
$LPVIT_CONTRACT_CACHE or ~/.cache/lpvit-edge/contract.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BINDINGS = {
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3.9": "tensorrt-cu12-bindings==10.13.3.9",
    "10.16.1.11": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
OLD_NUMPY = "numpy==1.26.4"
_LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
_SHIM = """
from tensorrt_bindings import *
from tensorrt_bindings import __version__
"""


def required() -> bool:
    """Whether a skip would be a failure here."""
    return os.environ.get("LPVIT_REQUIRE_CONTRACT") == "1"


def give_up(reason: str) -> None:
    """Skip, or fail where the contract must be checked."""
    if required():
        pytest.fail(f"{reason}, and LPVIT_REQUIRE_CONTRACT=1")
    pytest.skip(reason)


def cache() -> Path:
    named = os.environ.get("LPVIT_CONTRACT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "lpvit-edge" / "contract"


def unpacked(requirement: str) -> Path:
    """The wheel of a requirement, unpacked into a folder that can stand on PYTHONPATH."""
    folder = cache() / requirement.replace("==", "-")
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(partial), requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = next(partial.glob("*.whl"), None) if partial.is_dir() else None
        if done.returncode or wheel is None:
            shutil.rmtree(partial, ignore_errors=True)
            give_up(f"cannot download {requirement}: {done.stderr.strip()[-200:]}")
        assert wheel is not None
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        wheel.unlink()
        (partial / "tensorrt").mkdir()
        (partial / "tensorrt" / "__init__.py").write_text(_SHIM)
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(partial)
    return folder


def stub_libraries(folder: Path) -> Path:
    """A folder for LD_LIBRARY_PATH with the stub under every name the bindings ask for."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        give_up("no C compiler to build the stub of TensorRT with")
    assert compiler is not None
    stub = folder / "stub.so"
    source = Path(__file__).with_name("stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(stub)], check=True)
    for library in _LIBRARIES:
        for major in (10, 11):
            shutil.copy(stub, folder / f"{library}.so.{major}")
    return folder
