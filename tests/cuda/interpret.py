"""The kernel's Triton source under Triton's interpreter, in a process of its own.

Triton decides between interpreting and compiling when it is imported, so a test process that also
compiles cannot do both: TRITON_INTERPRET=1 python -m tests.cuda.interpret OUT.npz
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_records import Setting
from benchmarks.gpu_settings import launch
from cuda_src.block_sparse_linear import block_sparse_linear
from lpvit_engines.cuda.half import Bits
from lpvit_engines.cuda.manifest import shipped_manifest
from lpvit_engines.cuda.torch_op import WeightTensors
from tests.cuda.layers import Case, layer

GUARD_ROWS = 3
GUARD = 0x7FFF  # a NaN in both formats
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

CASES = [
    *(
        Case(
            block_rows=variant.block_rows,
            block_cols=variant.block_cols,
            dtype=variant.dtype,
            epilogue=variant.epilogue,
        )
        for variant in shipped_manifest().variants
    ),
    Case(block_rows=64, block_cols=32, epilogue="gelu", tokens=1),
    Case(block_rows=64, block_cols=32, epilogue="residual", tokens=64),
    Case(block_rows=64, block_cols=32, epilogue="gelu", tokens=65),
    Case(block_rows=64, block_cols=16, epilogue="gelu", keep=0.0),
    Case(block_rows=64, block_cols=8, epilogue="none", keep=1.0),
]


def interpret(case: Case) -> Bits:
    """The result (tokens + guard rows, out_features)."""
    problem = layer(case)
    dtype, packed = DTYPES[case.dtype], problem.packed

    def half(bits: Bits) -> Any:
        return torch.from_numpy(bits).view(dtype)

    shape = (case.tokens + GUARD_ROWS, packed.out_features)
    y = half(np.full(shape, GUARD, np.uint16))
    kernel: Any = block_sparse_linear  # type checkers see no launch syntax
    kernel[(case.block_row_count, -(-case.tokens // 64))](
        half(problem.x),
        half(packed.values),
        torch.from_numpy(packed.rows),
        torch.from_numpy(packed.columns),
        half(problem.bias),
        half(problem.residual),
        case.tokens,
        case.in_features,
        packed.out_features,
        y,
        BM=64,
        BN=case.block_rows,
        BK=case.block_cols,
        KT=64,
        EPILOGUE=case.epilogue,
        UPCAST=case.dtype == "bfloat16",
    )
    found: Bits = y.view(torch.uint16).numpy()
    return found


# What benchmarks/gpu_tune.py tries, through its own launcher. 3 parts do not divide the panels, and
# 8 are more than there are.
SETTINGS = [
    Setting(tile_rows=32),
    Setting(tile_rows=128, warps=8, stages=7),
    Setting(schedule="persistent", parts=1),
    Setting(tile_rows=32, schedule="persistent", parts=4),
    Setting(schedule="split-K", parts=3),
    Setting(tile_rows=128, schedule="split-K", parts=8),
]
TUNED = [
    (setting, case)
    for setting in SETTINGS
    for case in (
        Case(block_rows=64, block_cols=32, epilogue="residual", tokens=65),
        Case(block_rows=64, block_cols=64, epilogue="gelu", tokens=197),
        Case(block_rows=32, block_cols=32, dtype="bfloat16", tokens=1, block_row_count=5),
        Case(block_rows=64, block_cols=16, epilogue="gelu", keep=0.0),
    )
]


def interpret_tuned(setting: Setting, case: Case) -> Bits:
    """The result (tokens + guard rows, out_features), on a device of two multiprocessors."""
    problem = layer(case)
    dtype, packed = DTYPES[case.dtype], problem.packed

    def half(bits: Bits) -> Any:
        return torch.from_numpy(bits).view(dtype)

    y = half(np.full((case.tokens + GUARD_ROWS, packed.out_features), GUARD, np.uint16))
    weight = WeightTensors(
        values=half(packed.values),
        rows=torch.from_numpy(packed.rows),
        columns=torch.from_numpy(packed.columns),
        bias=half(problem.bias),
        in_features=packed.in_features,
        block_cols=packed.block_cols,
    )
    launch(
        setting,
        half(problem.x),
        weight,
        multiprocessors=2,
        y=y,
        epilogue=case.epilogue,
        residual=half(problem.residual),
        interpreted=True,
    )
    found: Bits = y.view(torch.uint16).numpy()
    return found


def name_of(tuned: tuple[Setting, Case]) -> str:
    return f"{tuned[0].name} {tuned[1]}"


def main(output: Path) -> None:
    results: dict[str, Any] = {str(case): interpret(case) for case in CASES}
    results |= {name_of(tuned): interpret_tuned(*tuned) for tuned in TUNED}
    np.savez(output, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
