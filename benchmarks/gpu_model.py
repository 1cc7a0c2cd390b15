"""A whole DeiT-B on a GPU: dense, 2:4 and block-sparse, milliseconds and millijoules per image.

    python -m benchmarks.gpu_model [--batches 1,8,32] [--json OUT.json]

The weights are random: this measures speed and energy; what accuracy a sparsity costs is measured
by the pruning benchmark. Every inference is one CUDA graph. This has not run on hardware yet.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import timm
import torch
from torch import nn

from benchmarks.gpu_contestants import DTYPES, Problem, pruned
from benchmarks.gpu_timing import captured, energy_mj, graph_us
from lpvit_edge.errors import LpvitEdgeError
from lpvit_engines.cuda.manifest import DType
from lpvit_engines.cuda.packing import pack
from lpvit_engines.cuda.torch_op import block_sparse_linear, to_tensors

BLOCKS = ((64, 64), (64, 32), (64, 16))
DENSITIES = (0.5, 0.4, 0.3)
INFERENCES = 20  # in one graph


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model at one batch. A value that could not be had is None and reason says why."""

    model: str
    batch: int
    latency_ms: float | None
    energy_mj_per_image: float | None
    reason: str | None


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the benchmark writes."""

    kind: Literal["gpu_model"] = "gpu_model"
    format: Literal[1] = 1
    device: str
    torch: str
    dtype: str
    rows: list[Row]


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


def block_sparse(model: Any, *, block: tuple[int, int], density: float) -> Any:
    """Replace the four linear layers of every block in place; fc1 takes the GELU along."""
    sparse = partial(BlockSparseLinear, block=block, density=density)
    for part in model.blocks:
        part.attn.qkv = sparse(part.attn.qkv, activation="none")
        part.attn.proj = sparse(part.attn.proj, activation="none")
        part.mlp.fc1 = sparse(part.mlp.fc1, activation="gelu")
        part.mlp.act = nn.Identity()
        part.mlp.fc2 = sparse(part.mlp.fc2, activation="none")
    return model


def with_zeros(model: Any, *, block: tuple[int, int], density: float) -> Any:
    """The same pruning, computed densely: the oracle of block_sparse."""
    for part in model.blocks:
        for linear in (part.attn.qkv, part.attn.proj, part.mlp.fc1, part.mlp.fc2):
            weight, _, _ = pruned(
                problem_of(linear), block_rows=block[0], block_cols=block[1], density=density
            )
            linear.weight.data = weight
    return model


def two_of_four(model: Any) -> Any:
    """2:4 by magnitude in the same layers, through cuSPARSELt."""
    for part in model.blocks:
        for linear in (part.attn.qkv, part.attn.proj, part.mlp.fc1, part.mlp.fc2):
            groups = linear.weight.detach().view(len(linear.weight), -1, 4)
            keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, dim=2).indices, 1)
            halved = torch.sparse.to_sparse_semi_structured((groups * keep).flatten(1))
            linear.weight = nn.Parameter(halved, requires_grad=False)
    return model


def entrants() -> dict[str, Callable[[Any], Any]]:
    """How each contestant changes the dense model."""
    found: dict[str, Callable[[Any], Any]] = {
        "dense": lambda model: model,
        "2:4 cuSPARSELt": two_of_four,
    }
    for block in BLOCKS:
        for density in DENSITIES:
            name = f"ours {block[0]}x{block[1]} d={density}"
            found[name] = partial(block_sparse, block=block, density=density)
    return found


def measure(name: str, change: Callable[[Any], Any], *, batch: int, dtype: DType) -> Row:
    torch.manual_seed(0)
    dense = timm.create_model("deit_base_patch16_224").eval().to("cuda", DTYPES[dtype])
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=DTYPES[dtype])
    try:
        with torch.inference_mode():
            model = change(dense)
            latency_us = graph_us(lambda _: model(images), copies=INFERENCES)
            spent = energy_mj(captured(lambda _: model(images), copies=INFERENCES))
    except (RuntimeError, ValueError, LpvitEdgeError) as refused:
        reason = f"{type(refused).__name__}: {str(refused).splitlines()[0]}"
        return Row(
            model=name, batch=batch, latency_ms=None, energy_mj_per_image=None, reason=reason
        )
    known = isinstance(spent, float)
    return Row(
        model=name,
        batch=batch,
        latency_ms=latency_us / 1e3,
        energy_mj_per_image=spent / (INFERENCES * batch) if isinstance(spent, float) else None,
        reason=None if known else str(spent),
    )


def line(row: Row, *, dense: Row) -> str:
    """One row as text, with the gains over dense."""
    where = f"{row.model:20} b{row.batch:<3}"
    if row.latency_ms is None or dense.latency_ms is None:
        return f"{where} -- {row.reason or dense.reason}"
    text = f"{where} {row.latency_ms:8.3f} ms {dense.latency_ms / row.latency_ms:5.2f}x"
    if row.energy_mj_per_image is None or dense.energy_mj_per_image is None:
        return f"{text}   energy: {row.reason or dense.reason}"
    gain = dense.energy_mj_per_image / row.energy_mj_per_image
    return f"{text}   {row.energy_mj_per_image:8.1f} mJ an image {gain:5.2f}x"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare a whole DeiT-B dense, 2:4 and block-sparse."
    )
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--dtype", default="float16", choices=list(DTYPES))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this benchmark measures, it does not estimate", file=sys.stderr)
        return 3
    table = Table(
        device=torch.cuda.get_device_name(), torch=torch.__version__, dtype=chosen.dtype, rows=[]
    )
    print(table.device)
    for batch in map(int, chosen.batches.split(",")):
        rows: list[Row] = []
        for name, change in entrants().items():
            rows.append(measure(name, change, batch=batch, dtype=chosen.dtype))
            print(line(rows[-1], dense=rows[0]), flush=True)
        table.rows.extend(rows)
    if chosen.json:
        chosen.json.write_bytes(msgspec.json.encode(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
