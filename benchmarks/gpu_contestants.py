"""The kernels that gpu_kernels.py compares on one layer: dense, 2:4, torch's block-sparse, ours."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from benchmarks.gpu_timing import Run
from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError
from lpvit_engines.cuda.manifest import DType
from lpvit_engines.cuda.packing import PackedWeight, pack
from lpvit_engines.cuda.torch_op import WeightTensors, block_sparse_linear, to_tensors

DTYPES: dict[DType, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_BSR_TILE = 64  # tokens


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One layer: x (tokens, in_features), a dense weight, a bias, on one device."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    dtype: DType
    copies: int


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to compute a layer; expected is its float32 result on weight copy 0."""

    run: Run
    expected: torch.Tensor
    density: float
    weight_bytes: int


def problem(
    *, out_features: int, in_features: int, tokens: int, dtype: DType, copies: int, device: str
) -> Problem:
    make = torch.Generator().manual_seed(out_features + in_features)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make).to(device, DTYPES[dtype])

    return Problem(
        x=normal(tokens, in_features),
        weight=normal(out_features, in_features) * in_features**-0.5,
        bias=normal(out_features),
        dtype=dtype,
        copies=copies,
    )


def dense(given: Problem) -> Contestant:
    weights = [given.weight.clone() for _ in range(given.copies)]
    return Contestant(
        run=lambda i: linear(given.x, weights[i], given.bias),
        expected=in_float32(given, given.weight),
        density=1.0,
        weight_bytes=given.weight.numel() * 2,
    )


def two_of_four(given: Problem) -> Contestant:
    """2:4 by magnitude, through cuSPARSELt with the algorithm that its own search finds. It takes
    tokens in multiples of 8, and is given the padded tokens for free."""
    weight, tokens = halved(given.weight), len(given.x)
    x = padded(given.x, multiple=8)
    weights = cusparselt(weight, tokens=tokens, bias=given.bias, copies=given.copies)
    return Contestant(
        run=lambda i: linear(x, weights[i], given.bias)[:tokens],
        expected=in_float32(given, weight),
        density=0.5,
        weight_bytes=weight.numel() * 9 // 8,  # half the values and two bits for each kept one
    )


def halved(weight: torch.Tensor) -> torch.Tensor:
    """The weight with the two smaller of every four values set to 0."""
    groups = weight.view(len(weight), -1, 4)
    keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, dim=2).indices, 1)
    return (groups * keep).view_as(weight)


def cusparselt(
    weight: torch.Tensor, *, tokens: int, bias: torch.Tensor, copies: int = 1
) -> list[Any]:
    """Copies of a weight with 2:4 zeros for cuSPARSELt; its search over algorithms has run for so
    many tokens. Raises EngineError where torch would compute by CUTLASS instead."""
    made: list[Any] = [torch.sparse.to_sparse_semi_structured(weight) for _ in range(copies)]
    backend = getattr(made[0], "BACKEND", "nothing known")
    if backend != "cusparselt":
        raise EngineError(
            f"torch computes 2:4 by {backend} here, and not by cuSPARSELt: install a torch that "
            "was built with it"
        )
    x = padded(torch.randn(tokens, weight.shape[1]).to(weight), multiple=8)
    library: Any = torch  # its type stubs do not know the search
    algorithm = int(library._cslt_sparse_mm_search(made[0].packed, x.t(), bias))
    for copy in made:
        copy.alg_id_cusparselt = algorithm
    return made


def padded(x: torch.Tensor, *, multiple: int) -> torch.Tensor:
    """x with zeros for tokens up to a multiple."""
    out = x.new_zeros(-(-len(x) // multiple) * multiple, x.shape[1])
    out[: len(x)] = x
    return out


@dataclass(frozen=True, kw_only=True)
class BsrWeights:
    """One pruned weight as torch's block-sparse tensors, shared by those who run it differently."""

    copies: list[torch.Tensor]
    x: torch.Tensor  # padded to the kernel's tile
    expected: torch.Tensor
    density: float
    weight_bytes: int


def bsr_weights(given: Problem, *, block: int, density: float) -> BsrWeights:
    weight, _, _ = pruned(given, block_rows=block, block_cols=block, density=density)
    return BsrWeights(
        copies=[weight.to_sparse_bsr((block, block)) for _ in range(given.copies)],
        x=padded(given.x, multiple=_BSR_TILE),
        expected=in_float32(given, weight) - given.bias.float(),
        density=density,
        weight_bytes=int(weight.numel() * density) * 2,
    )


def torch_bsr(
    given: Problem,
    *,
    weights: Callable[[Problem], BsrWeights],
    stages: int | None = None,
    tuned: bool = False,
) -> Contestant:
    """torch's own Triton kernel for square blocks. It needs tokens in multiples of its tile, adds
    no bias and returns the transposed result, so it is given the padded tokens for free.

    Its settings are tuned for an A100 alone and one stage elsewhere, which overlaps nothing. With
    stages it is asked for so many: its indirect load eats some of them, so that on sm_80 3 leave
    one buffer, 5 two and 7 three. tuned lets torch's own tuner choose. Raises EngineError without
    triton, whose absence torch finds only inside the kernel.
    """
    require("triton")
    from torch.sparse._triton_ops import bsr_dense_addmm

    made, tokens = weights(given), len(given.x)
    columns = made.x.t()
    out = torch.empty(len(given.weight), len(made.x)).to(given.x)
    meta: dict[str, int] | None = None
    if stages is not None:
        tiles = len(made.x) // _BSR_TILE
        meta = {"SPLIT_N": tiles, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": 4}
    if tuned:
        from torch.sparse import _triton_ops_meta as torchs

        tune: Any = torchs.tune_bsr_dense_addmm
        meta = tune(out, made.copies[0], columns, beta=0, out=out)

    def run(i: int) -> torch.Tensor:
        bsr_dense_addmm(out, made.copies[i], columns, beta=0, out=out, meta=meta)
        return out.t()[:tokens]

    return Contestant(
        run=run, expected=made.expected, density=made.density, weight_bytes=made.weight_bytes
    )


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """The copies of one pruned weight on the device, and the layer's float32 result with it."""

    copies: list[WeightTensors]
    expected: torch.Tensor
    density: float
    weight_bytes: int


def ours(given: Problem, *, block: tuple[int, int], density: float) -> Contestant:
    return shipped(given, weights=block_weights(given, block=block, density=density))


def shipped(given: Problem, *, weights: BlockWeights) -> Contestant:
    """The binaries that ship, through the torch operator."""
    return Contestant(
        run=lambda i: block_sparse_linear(given.x, weights.copies[i]),
        expected=weights.expected,
        density=weights.density,
        weight_bytes=weights.weight_bytes,
    )


def block_weights(given: Problem, *, block: tuple[int, int], density: float) -> BlockWeights:
    weight, values, (row_ptr, col_idx) = pruned(
        given, block_rows=block[0], block_cols=block[1], density=density
    )
    packed = pack(values, row_ptr, col_idx, in_features=given.weight.shape[1], dtype=given.dtype)
    return BlockWeights(
        copies=[tensors_of(packed, given) for _ in range(given.copies)],
        expected=in_float32(given, weight),
        density=density,
        weight_bytes=packed.values.nbytes + packed.columns.nbytes + packed.rows.nbytes,
    )


def tensors_of(packed: PackedWeight, given: Problem) -> WeightTensors:
    return to_tensors(packed, given.bias.float().cpu().numpy(), device=str(given.x.device))


def in_float32(given: Problem, weight: torch.Tensor) -> torch.Tensor:
    return linear(given.x.float(), weight.float(), given.bias.float())


def pruned(
    given: Problem, *, block_rows: int, block_cols: int, density: float
) -> tuple[torch.Tensor, Any, tuple[Any, Any]]:
    """The blocks of largest norm: the dense weight with zeros, the blocks, (row_ptr, col_idx)."""
    out_features, in_features = given.weight.shape
    grid = (out_features // block_rows, block_rows, in_features // block_cols, block_cols)
    blocks = given.weight.view(grid).transpose(1, 2)
    norms = blocks.float().square().sum((2, 3))
    keep = torch.zeros(norms.numel(), dtype=torch.bool, device=norms.device)
    keep[norms.view(-1).topk(round(density * norms.numel())).indices] = True
    keep = keep.view_as(norms)
    weight = (blocks * keep[:, :, None, None]).transpose(1, 2).reshape_as(given.weight)
    mask = keep.cpu().numpy()
    row_ptr = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    col_idx = mask.nonzero()[1].astype(np.int32)
    return weight, blocks[keep].float().cpu().numpy(), (row_ptr, col_idx)
