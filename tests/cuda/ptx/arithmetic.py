"""Instructions that compute from registers to registers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.cuda.ptx.cta import TYPES, Cta, Vector, elements
from tests.cuda.ptx.memory import Lanes
from tests.cuda.ptx.program import Instruction

_BINARY: dict[str, Callable[[Vector, Vector], Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
_COMPARE: dict[str, Callable[[Vector, Vector], Any]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "eq": np.equal,
    "ne": np.not_equal,
}
_WIDE = {"s32": "s64", "u32": "u64"}


def binary(
    cta: Cta, instruction: Instruction, active: Lanes, *, compute: Callable[..., Any]
) -> None:
    to, a, b = instruction.operands
    kind = instruction.opcode[-1]
    if "wide" in instruction.opcode:
        wide = TYPES[_WIDE[kind]]
        cta.write(
            to, compute(cta.read(a, kind).astype(wide), cta.read(b, kind).astype(wide)),
            active=active,
        )  # fmt: skip
        return
    cta.write(to, compute(cta.read(a, kind), cta.read(b, kind)), active=active)


def mad(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    to, a, b, c = instruction.operands
    kind = instruction.opcode[-1]
    x, y = cta.read(a, kind), cta.read(b, kind)
    if "wide" in instruction.opcode:
        wide = _WIDE[kind]
        x, y = x.astype(TYPES[wide]), y.astype(TYPES[wide])
        kind = wide
    cta.write(to, x * y + cta.read(c, kind), active=active)


def fma(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    """One rounding: the product of two float32 is exact in float64."""
    to, *sources = instruction.operands
    a, b, c = (cta.read(source, "f32").astype(np.float64) for source in sources)
    cta.write(to, (a * b + c).astype(np.float32), active=active)


def unary(
    cta: Cta, instruction: Instruction, active: Lanes, *, compute: Callable[[Vector], Any]
) -> None:
    to, a = instruction.operands
    cta.write(to, compute(cta.read(a, instruction.opcode[-1])), active=active)


def shift(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    """Shifts by the width or more give 0, or the sign for a signed right shift."""
    to, a, b = instruction.operands
    value = cta.read(a, instruction.opcode[-1])
    width = value.dtype.itemsize * 8
    amount = cta.read(b, "u32").astype(np.int64)
    signed_right = instruction.opcode[0] == "shr" and value.dtype.kind == "i"
    within = np.minimum(amount, width - 1).astype(value.dtype)
    moved = value << within if instruction.opcode[0] == "shl" else value >> within
    cleared = np.where((amount < width) | signed_right, moved, 0)
    cta.write(to, cleared.astype(value.dtype), active=active)


def bit_field(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    to, a, start, length = instruction.operands
    bits = int(length, 0)
    field = (cta.read(a, "u32") >> np.uint32(int(start, 0))) & np.uint32((1 << bits) - 1)
    if instruction.opcode[-1] == "s32":
        sign = np.uint32(1 << (bits - 1))
        field = (field ^ sign) - sign
    cta.write(to, field, active=active)


def compare(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    to, a, b = instruction.operands
    kind = instruction.opcode[-1]
    cta.write(
        to, _COMPARE[instruction.opcode[1]](cta.read(a, kind), cta.read(b, kind)), active=active
    )


def select(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    to, a, b, predicate = instruction.operands
    kind = instruction.opcode[-1]
    chosen = np.where(cta.predicate(predicate), cta.read(a, kind), cta.read(b, kind))
    cta.write(to, chosen, active=active)


def move(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    to, a = instruction.operands
    if to.startswith("{"):  # unpack: the first element is the low half
        for index, register in enumerate(elements(to)):
            half = cta.read(a, "b32") >> np.uint32(16 * index)
            cta.write(register, half.astype(np.uint16), active=active)
    elif a.startswith("{"):
        low, high = (cta.read(part, "b16").astype(np.uint32) for part in elements(a))
        cta.write(to, low | high << np.uint32(16), active=active)
    elif instruction.opcode[1] == "pred":
        cta.write(to, cta.predicate(a), active=active)
    else:
        cta.write(to, cta.read(a, instruction.opcode[1]), active=active)


def convert(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    target, source = instruction.opcode[-2:]
    if target in ("f16x2", "bf16x2"):
        _convert_pair(cta, instruction, active)
        return
    to, a = instruction.operands
    if target == "bf16":
        value = float32_to_bfloat16(cta.read(a, "f32"))
    elif source == "bf16":
        value = bfloat16_to_float32(cta.read(a, "b16"))
    else:
        value = cta.read(a, source).astype(TYPES[target])
    cta.write(to, value, active=active)


def _convert_pair(cta: Cta, instruction: Instruction, active: Lanes) -> None:
    """Two float32 into one register: the first operand becomes the high half."""
    to, *sources = instruction.operands
    high, low = (cta.read(source, "f32") for source in sources)
    halves = [
        float32_to_bfloat16(value)
        if instruction.opcode[-2] == "bf16x2"
        else value.astype(np.float16).view(np.uint16)
        for value in (low, high)
    ]
    cta.write(to, np.ascontiguousarray(np.stack(halves, 1)).view(np.uint32)[:, 0], active=active)


def float32_to_bfloat16(value: Vector) -> Vector:
    bits = value.view(np.uint32)
    to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + to_even) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def bfloat16_to_float32(bits: Vector) -> Vector:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


ARITHMETIC: dict[str, Callable[[Cta, Instruction, Lanes], None]] = {
    **{name: partial(binary, compute=compute) for name, compute in _BINARY.items()},
    "abs": partial(unary, compute=np.abs),
    "neg": partial(unary, compute=np.negative),
    "ex2": partial(unary, compute=np.exp2),
    "fma": fma,
    "mad": mad,
    "shl": shift,
    "shr": shift,
    "bfe": bit_field,
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvt": convert,
}
