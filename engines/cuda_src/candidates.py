"""Other schedules of block_sparse_linear, for benchmarks/gpu_tune.py to try; none of them ships.

    persistent   as many CTAs as fit on the device, each of them walks over tiles
    split-K      several CTAs share the panels of one block row, and a second kernel adds them up

Both compute what block_sparse_linear computes, with its main loop and its epilogue.
"""

import triton
import triton.language as tl

from cuda_src.block_sparse_linear import finish, panel_sum


@triton.jit  # type: ignore[untyped-decorator]
def persistent(  # type: ignore[no-untyped-def]
    x,
    values,
    rows,
    columns,
    bias,
    residual,
    M,
    ldx,
    ldy,
    y,
    block_rows,  # how many there are
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.arange(0, BN)
    # Tiles of one block row are block_rows apart, so that the long rows still come first.
    for tile in range(tl.program_id(0), block_rows * tl.cdiv(M, BM), tl.num_programs(0)):
        row = rows + tile % block_rows * 4
        m = tile // block_rows * BM + tl.arange(0, BM)
        x_row = x + tl.where(m < M, m, 0)[:, None] * ldx
        acc = panel_sum(
            x_row, n, values, columns, tl.load(row + 1), tl.load(row + 2), BM, BN, BK, KT, UPCAST
        )
        finish(acc, bias, residual, m, tl.load(row) * BN + n, M, ldy, y, EPILOGUE)


@triton.jit  # type: ignore[untyped-decorator]
def split_sum(  # type: ignore[no-untyped-def]
    x,
    values,
    rows,
    columns,
    M,
    ldx,
    ldy,
    partial,  # (SPLITS, M, ldy) float32
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One part of the panels of a block row, without bias and epilogue."""
    row = rows + tl.program_id(0) * 4
    part = tl.program_id(2)
    n = tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    x_row = x + tl.where(m < M, m, 0)[:, None] * ldx
    begin, end = tl.load(row + 1), tl.load(row + 2)
    each = tl.cdiv(end - begin, SPLITS)
    first = begin + part * each
    acc = panel_sum(
        x_row, n, values, columns, first, tl.minimum(first + each, end), BM, BN, BK, KT, UPCAST
    )
    out = tl.load(row) * BN + n
    place = (part * M + m)[:, None] * ldy + out[None, :]
    tl.store(partial + place, acc, mask=(m < M)[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def add_splits(  # type: ignore[no-untyped-def]
    partial,  # (SPLITS, M, ldy) float32
    bias,
    residual,
    M,
    ldy,
    y,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """y from the parts of split_sum; a CTA adds up BM rows of BN outputs."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    out = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for part in range(SPLITS):
        place = (part * M + m)[:, None] * ldy + out[None, :]
        acc += tl.load(partial + place, mask=(m < M)[:, None], other=0.0)
    finish(acc, bias, residual, m, out, M, ldy, y, EPILOGUE)
