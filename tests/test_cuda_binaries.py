"""The binaries that ship: made from the source beside them, and fit for the hardware."""

import hashlib
import re
import struct
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from cuda_src import compile as kernels
from cuda_src.build import PARAMETERS, archive, build_variant, source_sha256
from cuda_src.report import disassemble, main_loop
from lpvit_edge.errors import EngineError, FileFormatError
from lpvit_engines.cuda.manifest import (
    BINARIES,
    Variant,
    read_image,
    read_manifest,
    shipped_manifest,
)
from tests.cuda.elf import attributes, parameter_table, sections

MANIFEST = shipped_manifest()
TARGETS = [*kernels.ASSEMBLERS, "ptx"]
CUBINS = [(variant, target) for variant in MANIFEST.variants for target in kernels.ASSEMBLERS]
# CUDA C Programming Guide, technical specifications per compute capability.
SHARED_LIMIT_BYTES = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_87": 163 * 1024, "sm_89": 99 * 1024,
    "sm_90": 227 * 1024, "sm_110": 227 * 1024,
}  # fmt: skip


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


def opcodes_of(variant: Variant, target: str) -> list[str]:
    """The opcodes of a cubin's machine code, in order."""
    pytest.importorskip("triton", reason="the disassembler comes with triton")
    code, _ = disassemble(read_image(variant, target=target))
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in code]


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


SAMPLE = [
    kernels.Recipe(block_rows=rows, block_cols=cols, dtype=dtype, epilogue=epilogue)
    for rows, cols, dtype, epilogue in (
        (64, 64, "float16", "gelu"),
        (64, 16, "bfloat16", "residual"),
        (64, 8, "float16", "none"),
        (16, 16, "bfloat16", "gelu"),
    )
]


def shipped(recipe: kernels.Recipe) -> Variant:
    return MANIFEST.find(
        block_rows=recipe.block_rows,
        block_cols=recipe.block_cols,
        dtype=recipe.dtype,
        epilogue=recipe.epilogue,
    )


@needs_triton
@pytest.mark.parametrize("recipe", SAMPLE, ids=str)
def test_the_source_compiles_to_the_ptx_that_ships(recipe: kernels.Recipe) -> None:
    """Triton alone does this, so it runs where torch has brought it, without any assembler."""
    compiled = kernels.compile_ptx(recipe)
    variant = shipped(recipe)
    assert compiled.text == read_image(variant, target="ptx").decode()
    assert compiled.shared_bytes == variant.images["ptx"].shared_bytes
    assert (compiled.entry, compiled.warps) == (MANIFEST.entry, variant.images["ptx"].warps)


@needs_tools
@pytest.mark.parametrize("recipe", SAMPLE, ids=str)
def test_a_rebuild_gives_the_same_bytes(recipe: kernels.Recipe) -> None:
    """Four of the 36 variants, for every target; cuda_src.build --check compares all."""
    rebuilt, contents = build_variant(recipe)
    assert rebuilt == shipped(recipe)
    for target, content in contents.items():
        assert content == read_image(rebuilt, target=target), target


def test_the_wheel_carries_every_binary() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling makes the wheel")
    files = wheel.WheelBuilder(str(Path(__file__).parent.parent)).recurse_included_files()
    inside = {Path(file.distribution_path) for file in files}
    assert {Path("lpvit_engines/cuda/binaries", path.name) for path in BINARIES.iterdir()} <= inside


def test_an_archive_of_the_same_members_has_the_same_bytes() -> None:
    assert archive({"b": b"2", "a": b"1"}) == archive({"a": b"1", "b": b"2"})


@pytest.mark.parametrize("target", kernels.ASSEMBLERS)
def test_nothing_spills_and_four_ctas_fit_on_an_sm(target: str) -> None:
    """65,536 registers an SM, 128 threads a CTA: four CTAs leave 128 registers a thread."""
    for variant in MANIFEST.variants:
        image = variant.images[target]
        assert image.spill_bytes == 0
        assert image.registers is not None
        assert 0 < image.registers <= 128
        assert image.warps == 4


@pytest.mark.parametrize("target", kernels.ASSEMBLERS)
def test_shared_memory_stays_under_the_device_limit(target: str) -> None:
    for variant in MANIFEST.variants:
        assert variant.images[target].shared_bytes <= SHARED_LIMIT_BYTES[target]


def test_four_ctas_share_an_orin_sm() -> None:
    for variant in MANIFEST.variants:
        assert 4 * (variant.images["sm_87"].shared_bytes + 1024) <= 164 * 1024


@pytest.mark.parametrize("target", kernels.ASSEMBLERS)
def test_every_cubin_says_itself_how_many_registers_it_takes_and_that_it_has_no_stack(
    target: str,
) -> None:
    """EIATTR_REGCOUNT (0x2f) and EIATTR_FRAME_SIZE (0x11); what spills lies in a stack frame."""
    for variant in MANIFEST.variants:
        info = sections(read_image(variant, target=target))[".nv.info"]
        registers, frames = (
            [struct.unpack("<II", found)[1] for found in attributes(info, number)]
            for number in (0x2F, 0x11)
        )
        assert registers == [variant.images[target].registers], variant.name
        assert frames == [0], variant.name


@pytest.mark.parametrize("target", kernels.ASSEMBLERS)
def test_every_cubin_wants_the_parameters_that_the_launcher_passes(target: str) -> None:
    assert MANIFEST.parameters == PARAMETERS
    expected, offset = [], 0
    for ordinal, parameter in enumerate(PARAMETERS):
        size = 8 if parameter.type == "pointer" else 4
        offset = -(-offset // size) * size
        expected.append((ordinal, offset, size))
        offset += size
    for variant in MANIFEST.variants:
        assert parameter_table(read_image(variant, target=target), entry=MANIFEST.entry) == expected


@pytest.mark.parametrize("target", kernels.ASSEMBLERS)
def test_a_cubin_is_for_its_own_architecture_in_a_format_its_first_driver_reads(
    target: str,
) -> None:
    """CUDA 12 writes ELF ABI 7 with the architecture in the low byte of e_flags; CUDA 13 writes
    ABI 8, one byte higher, which a CUDA 12 driver (JetPack 6, on sm_87) cannot be trusted to read.
    """
    for variant in MANIFEST.variants:
        elf = read_image(variant, target=target)
        (flags,) = struct.unpack_from("<I", elf, 0x30)
        assert elf[8] == (8 if target == "sm_110" else 7)
        assert (flags >> (8 if elf[8] == 8 else 0)) & 0xFF == int(target.removeprefix("sm_"))


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_87", "sm_89", "sm_110"])
@pytest.mark.parametrize("variant", MANIFEST.variants[::5], ids=lambda v: v.name)
def test_the_machine_code_multiplies_on_tensor_cores_and_keeps_registers(
    variant: Variant, target: str
) -> None:
    opcodes = opcodes_of(variant, target)
    tensor = [op for op in opcodes if op.startswith("HMMA.16816.F32")]
    # One panel: 64 x block_rows x 64 by 4 warps in steps of 16 x 8 x 16.
    per_panel = (64 // 16) * (variant.block_rows // 8) * (64 // 16) // 4
    assert len(tensor) >= per_panel
    assert not [op for op in opcodes if op.split(".")[0] in ("LDL", "STL")]
    wide = [op for op in opcodes if op.startswith("LDGSTS") and "128" in op]
    assert wide, "X and W are copied 16 bytes at a time"


def test_the_columns_of_a_64_row_block_do_not_change_the_cost_of_a_panel() -> None:
    """8 columns cost what 64 cost: only the gather differs, and it stays at nine copies."""
    pytest.importorskip("triton", reason="the disassembler comes with triton")
    loops = [
        main_loop(MANIFEST.find(block_rows=64, block_cols=cols, dtype="float16"), target="sm_87")
        for cols in (64, 32, 16, 8)
    ]
    assert [(loop.tensor, loop.copies) for loop in loops] == [(32, 9)] * 4
    assert max(loop.instructions for loop in loops) <= 121


@pytest.mark.parametrize("variant", MANIFEST.variants[::12], ids=lambda v: v.name)
def test_hopper_uses_its_own_matrix_instruction(variant: Variant) -> None:
    opcodes = opcodes_of(variant, "sm_90")
    assert [op for op in opcodes if op.startswith("HGMMA")]
    assert not [op for op in opcodes if op.split(".")[0] in ("LDL", "STL")]


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
