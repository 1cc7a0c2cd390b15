"""The PTX of sm_90, which uses wgmma, executed instruction by instruction, and faults sown into it.

It does not ship: its cubins do. test_cuda_binaries.py holds that they are assembled from it.
"""

from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import pytest

from cuda_src import compile as kernels
from lpvit_engines.cuda.manifest import Image, shipped_manifest
from tests.cuda.layers import Case, assert_close, layer
from tests.cuda.ptx.memory import MemoryFaultError
from tests.cuda.ptx_run import run_ptx
from tests.test_cuda_ptx import EDGES, VARIANTS

try:
    FOUND = version("triton")
except PackageNotFoundError:
    FOUND = "absent"
if kernels.TRITON != FOUND:
    pytest.skip(f"compiling needs triton=={kernels.TRITON}", allow_module_level=True)


@lru_cache
def compiled(block_rows: int, block_cols: int, dtype: str, epilogue: str) -> kernels.Ptx:
    recipe = kernels.Recipe(
        block_rows=block_rows, block_cols=block_cols, dtype=dtype, epilogue=epilogue
    )
    return kernels.compile_ptx(recipe, architecture=90)


def hopper_ptx(case: Case) -> tuple[str, Image]:
    """The text that the shipped sm_90 cubin of a case was assembled from, and its launch."""
    ptx = compiled(case.block_rows, case.block_cols, case.dtype, case.epilogue)
    variant = shipped_manifest().find(
        block_rows=case.block_rows,
        block_cols=case.block_cols,
        dtype=case.dtype,
        epilogue=case.epilogue,
    )
    image = variant.images["sm_90"]
    assert (ptx.shared_bytes, ptx.warps) == (image.shared_bytes, image.warps)
    return ptx.text, image


@pytest.mark.parametrize("case", VARIANTS + EDGES, ids=str)
def test_the_hopper_ptx_computes_the_layer_and_writes_nothing_else(case: Case) -> None:
    ptx, image = hopper_ptx(case)
    assert "wgmma.mma_async" in ptx
    problem = layer(case)
    assert_close(run_ptx(case, problem, ptx=ptx, image=image), case, problem.expected)


# Enough panels that copies and multiplications overlap.
CASE = Case(block_rows=64, block_cols=16, tokens=70, in_features=768, keep=0.6)
FAULTS = {
    "no wait for the accumulators": (
        ("wgmma.wait_group.sync.aligned 0;", ""),
        "read before the wait for its wgmma",
    ),
    "one multiplication too many in flight": (
        ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
        "write to shared memory that a wgmma may still read",
    ),
    "no proxy fence": (
        ("fence.proxy.async.shared::cta;", ""),
        "without a proxy fence after its write",
    ),
    "no barrier": (("bar.sync", "bar.warp.sync"), "before a barrier after its write"),
    "no fence of the accumulators": (
        ("wgmma.fence.sync.aligned;", ""),
        "changed since the last wgmma.fence",
    ),
    "late copies": (("cp.async.wait_group \t1", "cp.async.wait_group \t5"), "misaligned access"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_sown_into_the_hopper_ptx_is_caught(name: str) -> None:
    (found, replacement), message = FAULTS[name]
    ptx, image = hopper_ptx(CASE)
    assert found in ptx
    with pytest.raises(MemoryFaultError, match=message):
        run_ptx(CASE, layer(CASE), ptx=ptx.replace(found, replacement), image=image)


# Eight rows in 1024 bytes, swizzled by 128; the columns 16 to 31 begin 32 bytes (2 units) further.
SWIZZLED_128, SWIZZLED_64 = 0x4000004000000000, 0x8000004000000000


@pytest.mark.parametrize(
    ("found", "replacement"),
    [
        (f"%rd60, {SWIZZLED_128};", f"%rd60, {SWIZZLED_64};"),
        (f"%rd60, {SWIZZLED_128 + 2};", f"%rd60, {SWIZZLED_128};"),
    ],
    ids=["another swizzle", "the first columns twice"],
)
def test_a_wrong_descriptor_gives_a_wrong_result(found: str, replacement: str) -> None:
    ptx, image = hopper_ptx(CASE)
    assert found in ptx
    problem = layer(CASE)
    result = run_ptx(CASE, problem, ptx=ptx.replace(found, replacement), image=image)
    with pytest.raises(AssertionError, match="off by up to"):
        assert_close(result, CASE, problem.expected)
