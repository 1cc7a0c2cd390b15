"""Faults sown into the shipped PTX, or into how it is launched, and every one is caught."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from tests.cuda.layers import Case, assert_close, layer
from tests.cuda.ptx.launch import launch
from tests.cuda.ptx.memory import MemoryFaultError
from tests.cuda.ptx_run import Arguments, run_ptx, shipped_ptx

# Enough panels that the copies in flight matter.
CASE = Case(block_rows=64, block_cols=16, tokens=70, in_features=768, keep=0.6)


def outcome(ptx: str) -> str:
    """What a run of changed PTX ends in."""
    _, image = shipped_ptx(CASE)
    problem = layer(CASE)
    try:
        found = run_ptx(CASE, problem, ptx=ptx, image=image)
        assert_close(found, CASE, problem.expected)
    except MemoryFaultError as fault:
        return f"fault: {fault}"
    except AssertionError:
        return "wrong"
    return "right"


def replaced(pattern: str, replacement: str) -> Callable[[str], str]:
    def change(ptx: str) -> str:
        changed, done = re.subn(pattern, replacement, ptx)
        assert done, f"nothing in the PTX matches {pattern}"
        return changed

    return change


def without_barriers(ptx: str) -> str:
    return ptx.replace("bar.sync", "bar.warp.sync")


def test_the_unchanged_ptx_is_right() -> None:
    assert outcome(shipped_ptx(CASE)[0]) == "right"


FAULTS = {
    "late wait": (  # the column table has not landed, so X is read from a poisoned address
        replaced(r"wait_group\s+1", "wait_group 5"),
        "fault: misaligned access to global memory",
    ),
    "no barrier": (
        without_barriers,
        "fault: read of shared memory before a barrier after its write",
    ),
    "transposed": (replaced(r"\.x4\.shared", ".x4.trans.shared"), "wrong"),
    "fragments swapped": (
        replaced(r"(mma\.sync\S+\s+\{[^}]*\}, )\{ (\S+), (\S+),", r"\1{ \3, \2,"),
        "wrong",
    ),
    "one row too many": (
        replaced(r"setp\.lt\.s32", "setp.le.s32"),
        "fault: access to global memory outside every buffer",
    ),
    "half of every copy": (replaced(r"0x10, %r", "0x8, %r"), "wrong"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_ptx_is_caught(name: str) -> None:
    change, expected = FAULTS[name]
    assert outcome(change(shipped_ptx(CASE)[0])) == expected


def start(arguments: Arguments, parameters: bytes, *, less_shared: int = 0) -> None:
    ptx, image = shipped_ptx(CASE)
    launch(
        ptx,
        grid=arguments.grid,
        threads=image.warps * 32,
        shared_bytes=image.shared_bytes - less_shared,
        parameters=parameters,
        memory=arguments.memory,
    )


def test_more_tokens_than_there_are_is_an_access_outside() -> None:
    arguments = Arguments(CASE, layer(CASE))
    with pytest.raises(MemoryFaultError, match="outside every buffer"):
        start(arguments, arguments.packed(tokens=CASE.tokens + 3))


def test_a_wrong_row_length_is_caught() -> None:
    problem = layer(CASE)
    arguments = Arguments(CASE, problem)
    start(arguments, arguments.packed(ldx=CASE.in_features - 16))
    with pytest.raises(AssertionError, match="off by"):
        assert_close(arguments.result(), CASE, problem.expected)


def test_an_input_off_by_one_element_is_misaligned() -> None:
    arguments = Arguments(CASE, layer(CASE), shift_bytes=2)
    with pytest.raises(MemoryFaultError, match="misaligned"):
        start(arguments, arguments.packed())


def test_forgotten_scratch_parameters_are_caught() -> None:
    arguments = Arguments(CASE, layer(CASE))
    with pytest.raises(AssertionError, match="bytes of parameters"):
        start(arguments, arguments.packed()[:-16])


def test_shared_memory_that_is_64_bytes_short_is_caught() -> None:
    arguments = Arguments(CASE, layer(CASE))
    with pytest.raises(MemoryFaultError, match="outside the CTA's shared memory"):
        start(arguments, arguments.packed(), less_shared=64)


def test_a_panel_table_that_points_past_the_weights_is_caught() -> None:
    problem = layer(CASE)
    problem.packed.rows[0, 1] = len(problem.packed.values) - 1
    problem.packed.rows[0, 2] = len(problem.packed.values) + 1
    arguments = Arguments(CASE, problem)
    with pytest.raises(MemoryFaultError, match="outside every buffer"):
        start(arguments, arguments.packed())


def test_a_column_table_of_another_weight_is_caught() -> None:
    problem = layer(CASE)
    problem.packed.columns[:] = np.roll(problem.packed.columns, 1)
    arguments = Arguments(CASE, problem)
    start(arguments, arguments.packed())
    with pytest.raises(AssertionError, match="off by"):
        assert_close(arguments.result(), CASE, problem.expected)
