"""What is shipped: the wheel and the source archive, built from a copy of the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="building needs hatchling")
pytest.importorskip("pip", reason="building a wheel needs pip")

from hatch_build import find_compiler, openvino_folder

ROOT = Path(__file__).parent.parent
SHIPPED = (
    "engines", "examples", "lpvit_edge", "profilers", "CHANGELOG.md", "LICENSE", "README.md",
    "hatch_build.py", "pyproject.toml",
)  # fmt: skip
PACKAGES = {
    "lpvit_edge": ROOT / "lpvit_edge",
    "lpvit_engines": ROOT / "engines" / "lpvit_engines",
    "lpvit_profilers": ROOT / "profilers" / "lpvit_profilers",
}
WHEEL_BYTES = 5_000_000


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without compiled libraries: those in use by other tests are not written again."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "runs", "images")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    if (ROOT / ".gitignore").exists():  # hatchling leaves out what git ignores
        shutil.copy(ROOT / ".gitignore", folder / ".gitignore")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """The wheel that pip builds, with the compiler and the headers of this machine."""
    try:
        find_compiler()
        openvino_folder()
    except RuntimeError as error:
        pytest.skip(str(error))
    command = "-m pip wheel . --no-build-isolation --no-deps --no-index --wheel-dir dist"
    build(checkout, *command.split())
    (path,) = (checkout / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    """The source archive of a checkout in which the libraries have been compiled."""
    for name in ("_block_sparse.so", "_tbb_threads.so"):
        library = checkout / "engines" / "lpvit_engines" / name
        if not library.exists():
            library.write_bytes(b"compiled")
    build(checkout, "-m", "hatchling", "build", "--target", "sdist")
    (path,) = (checkout / "dist").glob("*.tar.gz")
    return path


def build(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_module_of_the_three_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in PACKAGES.items():
        modules = {f"{package}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}
        assert f"{package}/__init__.py" in modules
        assert modules - names == set()
        assert f"{package}/py.typed" in names


def test_the_wheel_holds_nothing_outside_the_three_packages(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    (metadata,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {*PACKAGES, metadata}


def test_the_wheel_holds_the_template_and_loadable_native_libraries(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        template = archive.read("lpvit_edge/report.html.j2")
        assert template == (ROOT / "lpvit_edge" / "report.html.j2").read_bytes()
        for name in ("_block_sparse.so", "_tbb_threads.so"):
            assert archive.read(f"lpvit_engines/{name}")[:4] == b"\x7fELF"


def test_the_wheel_holds_the_gpu_binaries_as_they_are_in_the_checkout(wheel: Path) -> None:
    folder = PACKAGES["lpvit_engines"] / "cuda" / "binaries"
    binaries = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"manifest.json", "ptx.zip", "sm_87.zip"} <= set(binaries)
    assert json.loads(binaries["manifest.json"])
    with zipfile.ZipFile(wheel) as archive:
        for name, content in binaries.items():
            assert archive.read(f"lpvit_engines/cuda/binaries/{name}") == content


def test_the_wheel_is_for_any_python_3_on_this_platform(wheel: Path) -> None:
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")


def test_the_wheel_weighs_less_than_5_mb(wheel: Path) -> None:
    assert wheel.stat().st_size < WHEEL_BYTES


def test_the_sdist_holds_the_sources_and_nothing_compiled(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = ROOT / "engines" / "native"
    sources = {f"engines/native/{path.name}" for path in native.iterdir() if path.is_file()}
    assert {"engines/native/kernel.cpp", "engines/native/kernel.h"} <= sources
    assert sources | {"hatch_build.py", "pyproject.toml", "LICENSE"} <= names
    assert {name for name in names if name.endswith((".so", ".o", ".pyc"))} == set()
