"""The binaries that ship: made from the source beside them, and fit for the hardware."""

import hashlib
import re
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from cuda_src import compile as kernels
from cuda_src.build import archive, assemble_variant, ptx_by_target, source_sha256
from lpvit_edge.errors import EngineError, FileFormatError
from lpvit_engines.cuda.manifest import (
    BINARIES,
    Variant,
    read_image,
    read_manifest,
    shipped_manifest,
)

MANIFEST = shipped_manifest()
TARGETS = [*kernels.ASSEMBLERS, "ptx"]
CUBINS = [(variant, target) for variant in MANIFEST.variants for target in kernels.ASSEMBLERS]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


TOOLS = {"triton": kernels.TRITON} | {a.package: a.version for a in kernels.ASSEMBLERS.values()}
needs_triton = pytest.mark.skipif(
    installed("triton") != kernels.TRITON, reason=f"compiling needs triton=={kernels.TRITON}"
)
needs_tools = pytest.mark.skipif(
    any(installed(package) != wanted for package, wanted in TOOLS.items()),
    reason="rebuilding needs " + ", ".join(f"{name}=={v}" for name, v in TOOLS.items()),
)


def test_the_binaries_were_built_from_the_source_beside_them() -> None:
    assert MANIFEST.source_sha256 == source_sha256(), (
        "engines/cuda_src changed: PYTHONPATH=.:engines python -m cuda_src.build"
    )


def test_the_manifest_names_the_toolchain_of_the_build_script() -> None:
    assert MANIFEST.triton == kernels.TRITON
    assert MANIFEST.assemblers == {t: a.version for t, a in kernels.ASSEMBLERS.items()}


def test_the_requirements_and_the_extra_name_the_toolchain_of_the_build_script() -> None:
    text = (Path(kernels.__file__).parent / "requirements.txt").read_text()
    pins = {line for line in text.splitlines() if not line.startswith("#")}
    assert pins == {f"{name}=={wanted}" for name, wanted in TOOLS.items()}
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert all(f'"{pin}"' in project for pin in pins)


def test_every_recipe_has_a_binary_for_every_target_and_nothing_else_ships() -> None:
    names = {variant.name for variant in MANIFEST.variants}
    assert len(names) == len(list(kernels.recipes())) == len(MANIFEST.variants)
    for target in TARGETS:
        with zipfile.ZipFile(BINARIES / f"{target}.zip") as found:
            assert set(found.namelist()) == names
    expected = {"manifest.json", *(f"{target}.zip" for target in TARGETS)}
    assert {path.name for path in BINARIES.iterdir()} == expected


@pytest.mark.parametrize("target", TARGETS)
def test_every_binary_is_the_one_in_the_manifest(target: str) -> None:
    for variant in MANIFEST.variants:
        image = variant.images[target]
        content = read_image(variant, target=target)
        assert hashlib.sha256(content).hexdigest() == image.sha256
        assert len(content) == image.size_bytes


def test_the_binaries_stay_under_two_megabytes() -> None:
    assert sum(path.stat().st_size for path in BINARIES.iterdir()) < 2_000_000


RECIPES = list(kernels.recipes())


def shape_of(recipe: kernels.Recipe) -> str:
    return f"{recipe.block_rows}x{recipe.block_cols}_{recipe.dtype}_{recipe.epilogue}"


def shipped(recipe: kernels.Recipe) -> Variant:
    return MANIFEST.find(
        block_rows=recipe.block_rows,
        block_cols=recipe.block_cols,
        dtype=recipe.dtype,
        epilogue=recipe.epilogue,
    )


@cache
def compiled(recipe: kernels.Recipe) -> dict[str, kernels.Ptx]:
    """Compiled once for the two tests that compare it."""
    return ptx_by_target(recipe)


@needs_triton
@pytest.mark.parametrize("recipe", RECIPES, ids=shape_of)
def test_the_source_compiles_to_the_ptx_that_ships(recipe: kernels.Recipe) -> None:
    """Triton alone does this, so it runs where torch has brought it, without any assembler."""
    ptx, variant = compiled(recipe)["ptx"], shipped(recipe)
    assert ptx.text == read_image(variant, target="ptx").decode()
    assert ptx.shared_bytes == variant.images["ptx"].shared_bytes
    assert (ptx.entry, ptx.warps) == (MANIFEST.entry, variant.images["ptx"].warps)


@needs_triton
def test_a_changed_option_of_the_build_does_not_pass_for_the_ptx_that_ships(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "STAGES", 7)
    recipe = RECIPES[0]
    assert kernels.compile_ptx(recipe).text != read_image(shipped(recipe), target="ptx").decode()


@needs_tools
@pytest.mark.parametrize("recipe", RECIPES, ids=shape_of)
def test_a_rebuild_gives_the_same_bytes(recipe: kernels.Recipe) -> None:
    """All 252 binaries that ship: every variant, every target."""
    rebuilt, contents = assemble_variant(recipe, compiled(recipe))
    assert rebuilt == shipped(recipe)
    assert set(contents) == set(TARGETS)
    for target, content in contents.items():
        assert content == read_image(rebuilt, target=target), target


def test_the_wheel_carries_every_binary() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling makes the wheel")
    files = wheel.WheelBuilder(str(Path(__file__).parent.parent)).recurse_included_files()
    inside = {Path(file.distribution_path) for file in files}
    assert {Path("lpvit_engines/cuda/binaries", path.name) for path in BINARIES.iterdir()} <= inside


def test_an_archive_of_the_same_members_has_the_same_bytes() -> None:
    assert archive({"b": b"2", "a": b"1"}) == archive({"a": b"1", "b": b"2"})


def test_the_ptx_is_old_enough_for_cuda_12_0_and_ampere() -> None:
    for variant in MANIFEST.variants:
        text = read_image(variant, target="ptx").decode("ascii")
        assert ".version 8.0\n.target sm_80\n" in text
        assert ".loc" not in text
        assert ".file" not in text


def test_every_panel_in_flight_has_its_own_buffer() -> None:
    """wait_group 1 leaves one group of copies running behind the multiplication; 0 would mean the
    single buffer that Triton builds from 3 or 4 stages."""
    for variant in MANIFEST.variants:
        text = read_image(variant, target="ptx").decode()
        waits = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", text)]
        assert max(waits) >= 1, variant.name


def test_a_changed_binary_is_refused(tmp_path: Path) -> None:
    variant = MANIFEST.variants[0]
    content = bytearray(read_image(variant, target="sm_87"))
    content[-1] ^= 1
    (tmp_path / "sm_87.zip").write_bytes(archive({variant.name: bytes(content)}))
    with pytest.raises(FileFormatError, match="the manifest says"):
        read_image(variant, target="sm_87", folder=tmp_path)


def test_a_binary_whose_compressed_bytes_are_damaged_is_refused(tmp_path: Path) -> None:
    variant = MANIFEST.variants[0]
    content = bytearray((BINARIES / "sm_87.zip").read_bytes())
    with zipfile.ZipFile(BINARIES / "sm_87.zip") as found:
        member = found.getinfo(variant.name)
    begin = member.header_offset + 30 + len(variant.name)  # behind the local header
    content[begin : begin + member.compress_size] = b"\xff" * member.compress_size
    (tmp_path / "sm_87.zip").write_bytes(bytes(content))
    with pytest.raises(FileFormatError, match=f"cannot read {variant.name}.*Reinstall"):
        read_image(variant, target="sm_87", folder=tmp_path)


def test_a_missing_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="Reinstall"):
        read_image(MANIFEST.variants[0], target="sm_87", folder=tmp_path)


def test_a_manifest_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    text = (BINARIES / "manifest.json").read_text()
    path.write_text(text.replace('"kind"', '"colour": "red", "kind"', 1))
    with pytest.raises(FileFormatError, match="colour"):
        read_manifest(path)


@pytest.mark.parametrize(
    "change", [{"block_cols": 128}, {"dtype": "float32"}, {"epilogue": "relu"}]
)
def test_a_layer_without_a_kernel_is_refused_with_what_there_is(change: dict[str, Any]) -> None:
    wanted: dict[str, Any] = {
        "block_rows": 64, "block_cols": 64, "dtype": "float16", "epilogue": "none",
    }  # fmt: skip
    with pytest.raises(EngineError, match="There are 64x64, 64x32, 64x16, 64x8, 32x32, 16x16"):
        MANIFEST.find(**(wanted | change))
