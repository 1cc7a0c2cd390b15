"""Instructions that move data, multiply fragments, or steer."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tests.cuda.ptx.arithmetic import bfloat16_to_float32
from tests.cuda.ptx.cta import TYPES, Cta, elements
from tests.cuda.ptx.memory import Lanes
from tests.cuda.ptx.program import Instruction


def load(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    to, source = instruction.operands
    space, kind = instruction.opcode[1], instruction.opcode[-1]
    if space == "param":
        cta.write(to, cta.parameter(source, kind), active=active)
        return
    registers = elements(to)
    width = np.dtype(TYPES[kind]).itemsize * len(registers)
    addresses = cta.address(source, shared=space == "shared")
    memory = cta.shared if space == "shared" else cta.memory
    content = np.ascontiguousarray(memory.load(addresses, width=width, active=active))
    for register, column in zip(registers, content.view(TYPES[kind]).T, strict=True):
        cta.write(register, column, active=active)


def store(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    target, source = instruction.operands
    space, kind = instruction.opcode[1], instruction.opcode[-1]
    columns = [cta.read(register, kind) for register in elements(source)]
    content = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
    memory = cta.shared if space == "shared" else cta.memory
    memory.store(cta.address(target, shared=space == "shared"), content, active=active)


def copy(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    """cp.async: reads global memory now, lands in shared memory at wait_group."""
    if instruction.opcode[2] == "commit_group":
        cta.commit_copies()
        return
    if instruction.opcode[2] == "wait_group":
        cta.wait_copies(pending=int(instruction.operands[0], 0))
        return
    target, source, size, *source_size = instruction.operands
    width = int(size, 0)
    reads = active
    if source_size:  # 0 fills with zeros and must not touch the address
        reads = active & (cta.read(source_size[0], "u32") > 0)
    addresses = cta.address(source, shared=False)
    content = cta.memory.load(addresses, width=width, active=reads)
    content[~reads] = 0
    index = cta.shared.reserve(cta.address(target, shared=True), width=width, active=active)
    cta.issue_copy(index, content, active=active.copy())


def load_matrices(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    """ldmatrix .x4: lanes 8j to 8j + 7 of a warp name the rows of its j-th 8x8 matrix."""
    assert "x4" in instruction.opcode
    to, source = instruction.operands
    addresses = cta.address(source, shared=True)
    rows = cta.shared.load(addresses, width=16, active=cta.everyone)
    matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(cta.warps, 4, 8, 8)
    if "trans" in instruction.opcode:
        matrices = matrices.transpose(0, 1, 3, 2)
    pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(cta.warps, 4, 32)
    for j, register in enumerate(elements(to)):
        cta.write(register, pairs[:, j].ravel(), active=active)


def store_matrices(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    """stmatrix .x4: lanes 8j to 8j + 7 of a warp name where the rows of its j-th 8x8 matrix go."""
    assert "x4" in instruction.opcode
    assert "trans" not in instruction.opcode
    target, source = instruction.operands
    pairs = np.stack([cta.read(register, "b32") for register in elements(source)])
    matrices = np.ascontiguousarray(pairs.reshape(4, cta.warps, 32).transpose(1, 0, 2))
    rows = matrices.reshape(cta.warps, 4, 8, 4).reshape(cta.threads, 4).view(np.uint8)
    cta.shared.store(cta.address(target, shared=True), rows, active=active)


def multiply(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    """mma.m16n8k16: fragments as the PTX ISA lays them out, sums in float32."""
    assert "m16n8k16" in instruction.opcode
    to, a, b, c = instruction.operands
    kind = "bf16" if "bf16" in instruction.opcode else "f16"
    left = fragments(cta, a, kind=kind)  # (4, warps, 8, 8)
    upper = np.concatenate([left[0], left[2]], axis=2)
    lower = np.concatenate([left[1], left[3]], axis=2)
    A = np.concatenate([upper, lower], axis=1)  # (warps, m 16, k 16)
    B = np.concatenate(list(fragments(cta, b, kind=kind)), axis=2)  # (warps, n 8, k 16)
    product = np.einsum("wmk,wnk->wmn", A, B)
    for j, (register, before) in enumerate(zip(elements(to), elements(c), strict=True)):
        half = product[:, 8 * (j >> 1) : 8 * (j >> 1) + 8, (j & 1) :: 2]
        cta.write(register, cta.read(before, "f32") + half.reshape(-1), active=active)


def fragments(cta: Cta, operand: str, *, kind: str) -> NDArray[np.float32]:
    """The 8x8 matrices in a list of registers, as (registers, warps, 8, 8) float32."""
    bits = np.stack([cta.read(register, "b32") for register in elements(operand)])
    halves = np.ascontiguousarray(bits).view(np.uint16)
    numbers = (
        bfloat16_to_float32(halves)
        if kind == "bf16"
        else halves.view(np.float16).astype(np.float32)
    )
    matrices: NDArray[np.float32] = numbers.reshape(len(bits), cta.warps, 8, 8)
    return matrices


def branch(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    if active.any() != active.all():
        raise NotImplementedError("a branch that diverges inside a CTA")
    if active.all():
        cta.counter = cta.labels[instruction.operands[0]]


def barrier(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    if instruction.opcode[1] == "sync":  # bar.warp.sync orders one warp, which is in lockstep here
        cta.shared.barrier()


def finish(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    assert active.all(), "threads that leave early"
    cta.finished = True


TRANSFER: dict[str, Callable[[Cta, Instruction, Lanes], None]] = {
    "ld": load,
    "st": store,
    "cp": copy,
    "ldmatrix": load_matrices,
    "stmatrix": store_matrices,
    "mma": multiply,
    "bra": branch,
    "bar": barrier,
    "ret": finish,
}
