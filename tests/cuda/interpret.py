"""The kernel's Triton source under Triton's interpreter, in a process of its own.

Triton decides between interpreting and compiling when it is imported, so a test process that also
compiles cannot do both: TRITON_INTERPRET=1 python -m tests.cuda.interpret OUT.npz
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cuda_src.block_sparse_linear import block_sparse_linear
from lpvit_engines.cuda.half import Bits
from lpvit_engines.cuda.manifest import shipped_manifest
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


def main(output: Path) -> None:
    results: dict[str, Any] = {str(case): interpret(case) for case in CASES}
    np.savez(output, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
