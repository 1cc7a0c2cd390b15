"""Running a kernel over a grid."""

from itertools import product

import numpy as np

from tests.cuda.ptx.arithmetic import ARITHMETIC
from tests.cuda.ptx.cta import Cta
from tests.cuda.ptx.memory import DeviceMemory
from tests.cuda.ptx.program import Program, parse
from tests.cuda.ptx.transfer import TRANSFER
from tests.cuda.ptx.warpgroup import WARPGROUP

INSTRUCTIONS = {**ARITHMETIC, **TRANSFER, **WARPGROUP}


def launch(
    ptx: str,
    *,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    parameters: bytes,
    memory: DeviceMemory,
) -> None:
    """Run every CTA of a grid, as cuLaunchKernel would with these bytes of parameters."""
    program = parse(ptx)
    assert threads == program.threads, f"{threads} threads for .reqntid {program.threads}"
    assert len(parameters) == program.parameter_bytes, (
        f"{len(parameters)} bytes of parameters for {program.parameter_bytes}"
    )
    with np.errstate(over="ignore", invalid="ignore"):
        for y, x in product(range(grid[1]), range(grid[0])):
            run(
                Cta(
                    program,
                    memory=memory,
                    parameters=parameters,
                    shared_bytes=shared_bytes,
                    block=(x, y),
                ),
                program,
            )


def run(cta: Cta, program: Program) -> None:
    """Run one CTA to its end."""
    while not cta.finished:
        instruction = program.instructions[cta.counter]
        cta.counter += 1
        try:
            execute = INSTRUCTIONS[instruction.opcode[0]]
        except KeyError:
            raise NotImplementedError(".".join(instruction.opcode)) from None
        execute(cta, instruction, cta.active(instruction))
