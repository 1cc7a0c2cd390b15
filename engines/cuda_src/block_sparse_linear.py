"""Y[M, N] = epilogue(X[M, K] @ W[N, K]^T + bias), W block-sparse, in one Triton kernel.

W arrives in the device format of lpvit_engines.cuda.packing: the kept blocks of one block row lie
side by side along K in panels of KT columns, and a table says from which column of X each segment
of a panel multiplies. One CTA computes BM rows of X times one block row. The shape of the matrix
instruction therefore never depends on the block's columns: these only set how X is gathered.

The order of the run-time parameters (inputs, int32 scalars, output) is the one TensorRT's
ahead-of-time plugins ask for.
"""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def panel_sum(  # type: ignore[no-untyped-def]
    x_row,  # (BM, 1) where the rows of X begin
    n,  # (BN,) rows of a block
    values,
    columns,
    first_panel,
    end_panel,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """(BM, BN) float32: rows of X times some panels of one block row."""
    SEGMENTS: tl.constexpr = KT // BK
    k = tl.arange(0, KT)
    w_tile = values + n[None, :] * KT + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for panel in range(first_panel, end_panel):
        if SEGMENTS == 1:
            column = tl.multiple_of(tl.load(columns + panel), BK) + k
        else:
            column = tl.load(columns + panel * SEGMENTS + k // BK) + k % BK
            # A promise: segments start at multiples of BK, so BK neighbours come in one copy.
            column = tl.max_contiguous(tl.multiple_of(column, BK), BK)
        a = tl.load(x_row + column[None, :])
        b = tl.load(w_tile + panel * (BN * KT))
        if UPCAST:  # Triton's interpreter multiplies bfloat16 bit patterns as integers
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit  # type: ignore[untyped-decorator]
def finish(acc, bias, residual, m, out, M, ldy, y, EPILOGUE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the bias, apply the epilogue, and store the rows below M."""
    acc += tl.load(bias + out).to(tl.float32)[None, :]
    inside = (m < M)[:, None]
    place = m[:, None] * ldy + out[None, :]
    if EPILOGUE == "gelu":
        # x * Phi(x) with erfc by Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7):
        # erff of libdevice would cost 1016 instructions a thread and 32 divergent branches.
        size = tl.abs(acc)
        t = 1.0 / (1.0 + 0.23164188840 * size)  # 0.3275911 / sqrt(2)
        poly = 1.061405429 * t - 1.453152027
        poly = (poly * t + 1.421413741) * t - 0.284496736
        poly = (poly * t + 0.254829592) * t
        acc = tl.maximum(acc, 0.0) - 0.5 * size * poly * tl.exp(-0.5 * acc * acc)
    elif EPILOGUE == "residual":
        acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def block_sparse_linear(  # type: ignore[no-untyped-def]
    x,  # (M, ldx) half
    values,  # (panels, BN, KT) half
    rows,  # (N / BN, 4) int32: block row, first panel, end panel, 0; longest first
    columns,  # (panels * KT / BK,) int32: first column of X of every segment
    bias,  # (N,) half
    residual,  # (M, ldy) half, read by the residual epilogue alone
    M,
    ldx,
    ldy,
    y,  # (M, ldy) half
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    KT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = rows + tl.program_id(0) * 4
    block_row = tl.load(row)
    first_panel = tl.load(row + 1)
    end_panel = tl.load(row + 2)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.arange(0, BN)
    # Rows past M read row 0 again, so that the main loop needs no mask; they are never stored.
    x_row = x + tl.where(m < M, m, 0)[:, None] * ldx
    acc = panel_sum(x_row, n, values, columns, first_panel, end_panel, BM, BN, BK, KT, UPCAST)
    out = block_row * BN + n
    finish(acc, bias, residual, m, out, M, ldy, y, EPILOGUE)
