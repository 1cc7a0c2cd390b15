"""The state of one CTA: registers, operands, and the copies that are on their way."""

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cuda.ptx.memory import (
    Addresses,
    Bytes,
    DeviceMemory,
    Lanes,
    MemoryFaultError,
    SharedMemory,
)
from tests.cuda.ptx.program import Instruction, Program

TYPES: dict[str, Any] = {
    "b16": np.uint16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
}  # fmt: skip
_UNSIGNED: dict[int, Any] = {2: np.uint16, 4: np.uint32, 8: np.uint64}

Vector = NDArray[Any]  # one element per thread


@dataclass(kw_only=True)
class Warpgroup:
    """The wgmma that are on their way: the bytes of shared memory that each committed group may
    still read, and of each accumulator the number of its newest group."""

    issued: list[Addresses] = field(default_factory=list)
    groups: list[list[Addresses]] = field(default_factory=list)
    newest: dict[str, int] = field(default_factory=dict)
    landed: int = 0  # groups that have been waited for


class Cta:
    """One CTA while it runs. Registers hold bit patterns, as unsigned integers of their width."""

    def __init__(
        self,
        program: Program,
        *,
        memory: DeviceMemory,
        parameters: bytes,
        shared_bytes: int,
        block: tuple[int, int],
    ) -> None:
        threads = program.threads
        self.threads, self.warps = threads, threads // 32
        self.everyone: Lanes = np.ones(threads, bool)
        self.memory = memory
        self.shared = SharedMemory(shared_bytes, threads=threads)
        self.labels = program.labels
        self.counter = 0
        self.finished = False
        self._program, self._parameters = program, parameters
        self._registers: dict[str, Vector] = {}
        self._special: dict[str, Vector] = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%ctaid.x": np.full(threads, block[0], np.uint32),
            "%ctaid.y": np.full(threads, block[1], np.uint32),
            "global_smem": np.zeros(threads, np.uint32),
        }
        self.in_flight: dict[str, Vector] = {}  # what wgmma will write, by register
        self.modified: set[str] = set()  # registers written since the last wgmma.fence
        self._issued: list[tuple[Addresses, Bytes, Lanes]] = []
        self._groups: list[list[tuple[Addresses, Bytes, Lanes]]] = []
        self.warpgroup = Warpgroup()

    def active(self, instruction: Instruction) -> Lanes:
        """The lanes whose predicate lets them execute an instruction."""
        if instruction.predicate is None:
            return self.everyone
        predicate: Lanes = self._registers[instruction.predicate]
        return ~predicate if instruction.negated else predicate

    def predicate(self, name: str) -> Lanes:
        if name in ("-1", "0"):
            return np.full(self.threads, name == "-1")
        found: Lanes = self._registers[name]
        return found

    def read(self, operand: str, type_name: str) -> Vector:
        """An operand as numbers of a PTX type; its width must be the type's."""
        dtype = np.dtype(TYPES[type_name])
        if operand in self.in_flight:
            raise MemoryFaultError(f"{operand} is read before the wait for its wgmma")
        if operand in self._registers or operand in self._special:
            found = self._registers.get(operand)
            found = self._special[operand] if found is None else found
            assert found.dtype.itemsize == dtype.itemsize, f"{operand} is not {type_name}"
            return found.view(dtype)
        bits = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        unsigned = _UNSIGNED[dtype.itemsize]
        return np.full(self.threads, bits % (1 << 8 * dtype.itemsize), unsigned).view(dtype)

    def write(self, register: str, value: Vector, *, active: Lanes) -> None:
        if register in self.in_flight:
            raise MemoryFaultError(f"{register} is written before the wait for its wgmma")
        self.modified.add(register)
        bits = np.ascontiguousarray(value)
        if bits.dtype != bool:
            bits = bits.view(_UNSIGNED[bits.dtype.itemsize])
        before = self._registers.get(register)
        kept = bits if before is None else np.where(active, bits, before)
        self._registers[register] = kept.copy()

    def address(self, operand: str, *, shared: bool) -> Addresses:
        """[register + offset], in bytes."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        assert found, f"cannot parse the address {operand}"
        base = self.read(found[1], "u32" if shared else "u64").astype(np.int64)
        return np.asarray(base + int(found[2] or 0), np.int64)

    def parameter(self, operand: str, type_name: str) -> Vector:
        offset, size = self._program.parameters[operand.strip("[]")]
        assert size == np.dtype(TYPES[type_name]).itemsize
        value = np.frombuffer(self._parameters, TYPES[type_name], 1, offset)
        return np.repeat(value, self.threads)

    def issue_copy(self, index: Addresses, content: Bytes, *, active: Lanes) -> None:
        self._issued.append((index, content, active))

    def commit_copies(self) -> None:
        self._groups.append(self._issued)
        self._issued = []

    def wait_copies(self, *, pending: int) -> None:
        """Let all copies land but the newest groups."""
        while len(self._groups) > pending:
            for index, content, active in self._groups.pop(0):
                self.shared.land(index, content, active=active)


def elements(operand: str) -> list[str]:
    """The registers of {a, b, ...}, or the single one."""
    return [name.strip() for name in operand.strip("{} ").split(",")]
