"""What the machine code of the shipped cubins is: its limits, its parameters, its tensor cores."""

import re
import struct

import pytest

from cuda_src import compile as kernels
from cuda_src.build import PARAMETERS
from cuda_src.report import disassemble, main_loop
from lpvit_engines.cuda.manifest import Variant, read_image, shipped_manifest
from tests.cuda.elf import attributes, parameter_table, section_sizes, sections

MANIFEST = shipped_manifest()
# CUDA C Programming Guide, technical specifications per compute capability.
SHARED_LIMIT_BYTES = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_87": 163 * 1024, "sm_89": 99 * 1024,
    "sm_90": 227 * 1024, "sm_110": 227 * 1024,
}  # fmt: skip


def opcodes_of(variant: Variant, target: str) -> list[str]:
    """The opcodes of a cubin's machine code, in order."""
    pytest.importorskip("triton", reason="the disassembler comes with triton")
    code, _ = disassemble(read_image(variant, target=target))
    return [re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in code]


def static_shared_bytes(variant: Variant, target: str) -> int:
    """The shared memory that a cubin reserves for itself, by its own section table."""
    sizes = section_sizes(read_image(variant, target=target))
    return sizes.get(f".nv.shared.{MANIFEST.entry}", 0)


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
    """What the launch asks for and what the cubin reserves itself count together."""
    for variant in MANIFEST.variants:
        dynamic, static = variant.images[target].shared_bytes, static_shared_bytes(variant, target)
        assert static in (0, 1024), variant.name
        assert dynamic + static <= SHARED_LIMIT_BYTES[target], variant.name
        # The launcher asks the driver for leave by the dynamic part alone.
        assert dynamic + static <= 48 * 1024 or dynamic > 48 * 1024, variant.name


def test_four_ctas_share_an_orin_sm() -> None:
    for variant in MANIFEST.variants:
        shared = variant.images["sm_87"].shared_bytes + static_shared_bytes(variant, "sm_87")
        assert 4 * (shared + 1024) <= 164 * 1024


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


# Every variant on Orin, every fifth elsewhere: a disassembly takes a fifth of a second.
DISASSEMBLED = [
    (variant, target)
    for target in ("sm_80", "sm_86", "sm_87", "sm_89", "sm_110")
    for variant in MANIFEST.variants[:: 1 if target == "sm_87" else 5]
]


@pytest.mark.parametrize(("variant", "target"), DISASSEMBLED, ids=lambda p: getattr(p, "name", p))
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


@pytest.mark.parametrize("variant", MANIFEST.variants[::5], ids=lambda v: v.name)
def test_hopper_uses_its_own_matrix_instruction(variant: Variant) -> None:
    opcodes = opcodes_of(variant, "sm_90")
    assert [op for op in opcodes if op.startswith("HGMMA")]
    assert not [op for op in opcodes if op.split(".")[0] in ("LDL", "STL")]
