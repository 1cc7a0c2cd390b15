"""Parsing the text of one PTX kernel."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """opcode is split at its dots; predicate is a register, negated when it is written @!%p1."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool


@dataclass(frozen=True, kw_only=True)
class Program:
    """A kernel: its parameters as name -> (offset, bytes), its code, where its labels point."""

    entry: str
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """Parse a file with one kernel."""
    head = ptx[ptx.index(".entry") :]
    parameters, parameter_bytes = _parameters(head[head.index("(") + 1 : head.index(")")])
    instructions, labels = _code(head[head.index("{") + 1 : head.rindex("}")])
    return Program(
        entry=_group(r"\.entry\s+(\w+)\(", head),
        parameters=parameters,
        parameter_bytes=parameter_bytes,
        threads=int(_group(r"\.reqntid\s+(\d+)", head)),
        instructions=instructions,
        labels=labels,
    )


def _group(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the PTX"
    return found[1]


def _parameters(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Offsets by the C rule: each parameter at a multiple of its own size."""
    found: dict[str, tuple[int, int]] = {}
    offset = 0
    for line in text.split(","):
        size = int(_group(r"\.param\s+\.[a-z](\d+)", line)) // 8
        offset = -(-offset // size) * size
        found[line.split()[-1]] = (offset, size)
        offset += size
    return found, offset


def _code(body: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for raw in body.splitlines():
        line = raw.split("//")[0].strip()
        while label := re.match(r"(\$?\w+):\s*", line):
            labels[label[1]] = len(instructions)
            line = line[label.end() :]
        statements = (statement.strip() for statement in line.split(";"))
        instructions += [_instruction(s) for s in statements if s and not s.startswith(".")]
    return tuple(instructions), labels


def _instruction(statement: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", statement)
    assert found, f"cannot parse {statement!r}"
    return Instruction(
        opcode=tuple(found[3].split(".")),
        operands=tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", found[4])),
        predicate=found[2],
        negated=found[1] == "!",
    )
