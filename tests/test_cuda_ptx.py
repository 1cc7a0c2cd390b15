"""The PTX that ships, executed instruction by instruction, against float64."""

import pytest

from lpvit_engines.cuda.manifest import shipped_manifest
from tests.cuda.layers import Case, assert_close, layer
from tests.cuda.ptx_run import run_ptx, shipped_ptx

VARIANTS = [
    Case(
        block_rows=variant.block_rows,
        block_cols=variant.block_cols,
        dtype=variant.dtype,
        epilogue=variant.epilogue,
        tokens=70,
        in_features=192,
    )
    for variant in shipped_manifest().variants
]
EDGES = [
    Case(block_rows=64, block_cols=16, epilogue="gelu", tokens=1),
    Case(block_rows=64, block_cols=32, epilogue="residual", tokens=64),
    Case(block_rows=64, block_cols=64, epilogue="residual", tokens=65),
    Case(block_rows=64, block_cols=8, tokens=197, keep=0.5),
    Case(block_rows=64, block_cols=16, tokens=33, keep=0.0),
    Case(block_rows=32, block_cols=32, tokens=33, keep=1.0),
    Case(block_rows=64, block_cols=16, tokens=40, in_features=1536, keep=0.3),
]


@pytest.mark.parametrize("case", VARIANTS + EDGES, ids=str)
def test_the_shipped_ptx_computes_the_layer_and_writes_nothing_else(case: Case) -> None:
    ptx, image = shipped_ptx(case)
    problem = layer(case)
    assert_close(run_ptx(case, problem, ptx=ptx, image=image), case, problem.expected)
