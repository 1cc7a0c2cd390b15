"""wgmma: a warpgroup multiplies tiles of shared memory that descriptors name, asynchronously.

Layouts as in the PTX ISA, "Asynchronous warpgroup level matrix instructions": K-major tiles with a
swizzle, rows in groups of eight; the accumulator of m64nN, of which a warp holds 16 rows.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cuda.ptx.arithmetic import bfloat16_to_float32
from tests.cuda.ptx.cta import Cta, elements
from tests.cuda.ptx.memory import Addresses, Lanes, MemoryFaultError
from tests.cuda.ptx.program import Instruction

_TILE_M, _TILE_K = 64, 16
# Swizzle mode of the descriptor -> bytes of a row, and how many of the 16-byte units in it are
# exchanged: bits 7, 8, 9 of an address are added without carry to bits 4, 5, 6.
_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


def warpgroup(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    assert active.all(), "wgmma that a part of the warpgroup does not execute"
    assert cta.threads == 128, "more than one warpgroup"
    step = instruction.opcode[1]
    if step == "fence":
        cta.modified.clear()
    elif step == "commit_group":
        cta.warpgroup.groups.append(cta.warpgroup.issued)
        cta.warpgroup.issued = []
    elif step == "wait_group":
        _wait(cta, pending=int(instruction.operands[0], 0))
    else:
        _multiply(cta, instruction)


def _multiply(cta: Cta, instruction: Instruction) -> None:
    to, a, b, accumulates, *constants = instruction.operands
    assert constants == ["1", "1", "0", "0"], "negated or transposed operands"
    columns = int(_group(r"m64n(\d+)k16", ".".join(instruction.opcode)))
    kind = instruction.opcode[-1]
    product = _tile(cta, a, _TILE_M, kind=kind) @ _tile(cta, b, columns, kind=kind).T
    registers = elements(to)
    assert len(registers) == columns // 2
    if cta.modified & set(registers):
        raise MemoryFaultError("accumulators were changed since the last wgmma.fence")
    lane, warp = np.arange(128) % 32, np.arange(128) // 32
    for index, register in enumerate(registers):
        row = 16 * warp + lane // 4 + 8 * (index >> 1 & 1)
        column = 8 * (index >> 2) + 2 * (lane % 4) + (index & 1)
        value = product[row, column]
        if cta.predicate(accumulates).all():
            before = cta.in_flight.get(register)
            value = value + (cta.read(register, "f32") if before is None else before)
        cta.in_flight[register] = value
        cta.warpgroup.newest[register] = cta.warpgroup.landed + len(cta.warpgroup.groups)


def _tile(cta: Cta, descriptor: str, rows: int, *, kind: str) -> NDArray[np.float32]:
    """The (rows, 16) tile that a matrix descriptor names."""
    bits = cta.read(descriptor, "b64")
    assert (bits == bits[0]).all(), "a descriptor that differs between threads"
    index = _addresses(int(bits[0]), rows)
    cta.warpgroup.issued.append(index)
    halves = np.ascontiguousarray(cta.shared.lend(index)).view(np.uint16)
    if kind == "bf16":
        return np.asarray(bfloat16_to_float32(halves), np.float32)
    return halves.view(np.float16).astype(np.float32)


def _addresses(descriptor: int, rows: int) -> Addresses:
    """Bytes of shared memory (rows, 32) of a K-major tile of 16 two-byte columns."""
    mode, base_offset = descriptor >> 62, descriptor >> 49 & 7
    if mode not in _SWIZZLES or base_offset:
        raise NotImplementedError(f"swizzle {mode} with base offset {base_offset}")
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    pitch, exchanged = _SWIZZLES[mode]
    row = np.arange(rows)
    first: Any = start + row // 8 * stride + row % 8 * pitch
    linear: Addresses = first[:, None] + np.arange(2 * _TILE_K)
    return linear ^ ((linear >> 7 & exchanged) << 4)


def _wait(cta: Cta, *, pending: int) -> None:
    """Let all groups land but the newest."""
    state = cta.warpgroup
    while len(state.groups) > pending:
        for index in state.groups.pop(0):
            cta.shared.give_back(index)
        state.landed += 1
    for register in [r for r, group in state.newest.items() if group < state.landed]:
        value = cta.in_flight.pop(register)
        del state.newest[register]
        unchanged = register not in cta.modified
        cta.write(register, value, active=cta.everyone)
        if unchanged:  # by anything but wgmma itself
            cta.modified.discard(register)


def fence(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    assert instruction.opcode[1:3] == ("proxy", "async")
    cta.shared.fence_for_the_matrix_unit()


def _group(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in {text}"
    return found[1]


WARPGROUP: dict[str, Callable[[Cta, Instruction, Lanes], None]] = {
    "wgmma": warpgroup,
    "fence": fence,
}
