"""The whole models that gpu_model.py compares, and their oracles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import gpu_contestants as contestants
from benchmarks.gpu_contestants import DTYPES, Problem, pruned
from lpvit_engines.cuda.manifest import DType
from lpvit_engines.cuda.packing import pack
from lpvit_engines.cuda.torch_op import block_sparse_linear, to_tensors

BLOCKS = ((64, 64), (64, 32), (64, 16))
DENSITIES = (0.5, 0.4, 0.3)
DENSE = "dense"


class BlockSparseLinear(nn.Module):
    """A linear layer, and a GELU behind it where asked, through the shipped kernels."""

    def __init__(
        self, linear: nn.Linear, *, block: tuple[int, int], density: float, activation: str
    ) -> None:
        super().__init__()
        given = problem_of(linear)
        _, values, (row_ptr, col_idx) = pruned(
            given, block_rows=block[0], block_cols=block[1], density=density
        )
        packed = pack(values, row_ptr, col_idx, in_features=linear.in_features, dtype=given.dtype)
        bias = linear.bias.detach().float().cpu().numpy()
        self.weight = to_tensors(packed, bias, device=str(linear.weight.device))
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return block_sparse_linear(x, self.weight, activation=self.activation)


def problem_of(linear: nn.Linear) -> Problem:
    """A layer's weight as the contestants of gpu_kernels.py take it."""
    names: dict[torch.dtype, DType] = {dtype: name for name, dtype in DTYPES.items()}
    weight = linear.weight.detach()
    return Problem(
        x=weight[:0], weight=weight, bias=linear.bias.detach(), dtype=names[weight.dtype], copies=1
    )


def block_sparse(model: Any, *, block: tuple[int, int], density: float, fuses: bool = True) -> Any:
    """Replace the four linear layers of every block in place; fc1 takes the GELU along if asked."""
    sparse = partial(BlockSparseLinear, block=block, density=density)
    for part in model.blocks:
        part.attn.qkv = sparse(part.attn.qkv, activation="none")
        part.attn.proj = sparse(part.attn.proj, activation="none")
        part.mlp.fc1 = sparse(part.mlp.fc1, activation="gelu" if fuses else "none")
        if fuses:
            part.mlp.act = nn.Identity()
        part.mlp.fc2 = sparse(part.mlp.fc2, activation="none")
    return model


def with_zeros(model: Any, *, block: tuple[int, int], density: float) -> Any:
    """The same pruning, computed densely: the oracle of block_sparse."""
    for linear in linears(model):
        weight, _, _ = pruned(
            problem_of(linear), block_rows=block[0], block_cols=block[1], density=density
        )
        linear.weight.data = weight
    return model


def linears(model: Any) -> Iterator[nn.Linear]:
    """The layers that every contestant prunes."""
    for part in model.blocks:
        yield from (part.attn.qkv, part.attn.proj, part.mlp.fc1, part.mlp.fc2)


def halved(model: Any) -> Any:
    """2:4 by magnitude in the same layers, computed densely: the oracle of two_of_four."""
    for linear in linears(model):
        linear.weight.data = contestants.halved(linear.weight.detach())
    return model


def two_of_four(model: Any, *, tokens: int) -> Any:
    """2:4 by magnitude, through cuSPARSELt, its algorithm searched for each layer."""
    for linear in linears(halved(model)):
        (weight,) = contestants.cusparselt(
            linear.weight.detach(), tokens=tokens, bias=linear.bias.detach()
        )
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """change makes the contestant from the dense model; prune only sets the same weights to 0, of
    which density is the part that stays."""

    change: Callable[[Any], Any]
    prune: Callable[[Any], Any]
    density: float


def entrants(*, tokens: int) -> dict[str, Entrant]:
    """How each contestant changes the dense model. The unfused ones leave GELU to torch, as dense
    does: what the others gain over them is fusion and not sparsity."""
    found = {
        DENSE: Entrant(change=lambda model: model, prune=lambda model: model, density=1.0),
        "2:4 cuSPARSELt": Entrant(
            change=partial(two_of_four, tokens=tokens), prune=halved, density=0.5
        ),
    }
    for block in BLOCKS:
        for density in DENSITIES:
            for name, fuses in (("ours", True), ("unfused", False)):
                found[f"{name} {block[0]}x{block[1]} d={density}"] = Entrant(
                    change=partial(block_sparse, block=block, density=density, fuses=fuses),
                    prune=partial(with_zeros, block=block, density=density),
                    density=density,
                )
    return found
