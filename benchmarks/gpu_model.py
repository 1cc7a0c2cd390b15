"""A whole DeiT-B on a GPU: dense, 2:4 and block-sparse, milliseconds and millijoules per image.

    python -m benchmarks.gpu_model [--batches 1,8,32] [--json OUT.json]

The weights are random: this measures speed and energy; what accuracy a sparsity costs is measured
by the pruning benchmark. Each model is first compared with its own pruned weights computed densely
in float32; a wrong one gets no time. INFERENCES inferences are one CUDA graph. Beside each time is
the floor that the device's own measured roofline sets for the pruned linear layers alone. This has
not run on hardware yet.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import timm
import torch
from torch import nn

from benchmarks.gpu_contestants import DTYPES, Problem, pruned
from benchmarks.gpu_timing import (
    Roofline,
    Timer,
    captured,
    energy_mj,
    graph_us,
    measured_roofline,
    reason_of,
    refusals,
)
from lpvit_engines.cuda.manifest import DType
from lpvit_engines.cuda.packing import pack
from lpvit_engines.cuda.torch_op import block_sparse_linear, to_tensors

BLOCKS = ((64, 64), (64, 32), (64, 16))
DENSITIES = (0.5, 0.4, 0.3)
INFERENCES = 20  # in one graph
# DeiT-Ti of 12 blocks on a CPU is off by 0.0013 and 0.011, dense or sparse; a pruning that was left
# out by 1.3.
TOLERANCE: dict[DType, float] = {"float16": 0.01, "bfloat16": 0.05}


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model at one batch. A value that could not be had is None and reason says why."""

    model: str
    batch: int
    latency_ms: float | None
    floor_ms: float | None  # of the pruned linear layers; attention and norms come on top
    energy_mj_per_image: float | None
    error: float | None  # largest difference from float32, over the largest logit
    reason: str | None


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the benchmark writes."""

    kind: Literal["gpu_model"] = "gpu_model"
    format: Literal[1] = 1
    device: str
    torch: str
    dtype: str
    peak_tflops: float
    bandwidth_gb_s: float
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
    for linear in linears(model):
        weight, _, _ = pruned(
            problem_of(linear), block_rows=block[0], block_cols=block[1], density=density
        )
        linear.weight.data = weight
    return model


def inference_energy_mj(run: Callable[[int], Any]) -> float | str:
    """Millijoules of one inference, or why there is no such number."""
    spent = energy_mj(captured(run, copies=INFERENCES))
    return spent if isinstance(spent, str) else spent / INFERENCES


def linears(model: Any) -> Iterator[nn.Linear]:
    """The layers that every contestant prunes."""
    for part in model.blocks:
        yield from (part.attn.qkv, part.attn.proj, part.mlp.fc1, part.mlp.fc2)


def halved(model: Any) -> Any:
    """2:4 by magnitude in the same layers, computed densely: the oracle of two_of_four."""
    for linear in linears(model):
        groups = linear.weight.detach().view(len(linear.weight), -1, 4)
        keep = torch.zeros_like(groups).scatter_(2, groups.abs().topk(2, dim=2).indices, 1)
        linear.weight.data = (groups * keep).flatten(1)
    return model


def two_of_four(model: Any) -> Any:
    """2:4 by magnitude, through cuSPARSELt."""
    for linear in linears(halved(model)):
        weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """change makes the contestant from the dense model; prune only sets the same weights to 0, of
    which density is the part that stays."""

    change: Callable[[Any], Any]
    prune: Callable[[Any], Any]
    density: float


def entrants() -> dict[str, Entrant]:
    """How each contestant changes the dense model."""
    found = {
        "dense": Entrant(change=lambda model: model, prune=lambda model: model, density=1.0),
        "2:4 cuSPARSELt": Entrant(change=two_of_four, prune=halved, density=0.5),
    }
    for block in BLOCKS:
        for density in DENSITIES:
            found[f"ours {block[0]}x{block[1]} d={density}"] = Entrant(
                change=partial(block_sparse, block=block, density=density),
                prune=partial(with_zeros, block=block, density=density),
                density=density,
            )
    return found


def linears_floor_ms(model: Any, *, batch: int, density: float, roofline: Roofline) -> float:
    """Milliseconds below which no kernels can compute the linear layers of a dense model, pruned to
    a density, one after the other from memory. Indices of the kept weights are not counted."""
    tokens = batch * model.pos_embed.shape[1]
    total_us = 0.0
    for linear in linears(model):
        kept = linear.weight.numel() * density
        moved = 2 * (kept + tokens * (linear.in_features + linear.out_features))
        total_us += roofline.floor_us(macs=kept * tokens, moved_bytes=moved)
    return total_us / 1e3


def deit_b(*, dtype: DType, device: str = "cuda") -> Any:
    torch.manual_seed(0)
    return timm.create_model("deit_base_patch16_224").eval().to(device, DTYPES[dtype])


def measure(
    name: str,
    entrant: Entrant,
    images: torch.Tensor,
    *,
    make: Callable[[], Any],
    tolerance: float,
    roofline: Roofline,
    timer: Timer = graph_us,
    energy: Callable[[Callable[[int], Any]], float | str] = inference_energy_mj,
) -> Row:
    """One row. What a library refuses, and a wrong result, give a reason instead of a time."""
    latency_ms, spent, error = None, None, None
    floor_ms = linears_floor_ms(
        make(), batch=len(images), density=entrant.density, roofline=roofline
    )
    try:
        with torch.inference_mode():
            expected = entrant.prune(make()).float()(images.float())
            model = entrant.change(make())
            error = float((model(images).float() - expected).abs().max() / expected.abs().max())
            reason = None if error <= tolerance else "the result is wrong"
            if reason is None:
                latency_ms = timer(lambda _: model(images), copies=INFERENCES) / 1e3
                spent = energy(lambda _: model(images))
    except refusals() as refused:
        reason = reason_of(refused)
    if isinstance(spent, str):
        spent, reason = None, spent
    return Row(
        model=name,
        batch=len(images),
        latency_ms=latency_ms,
        floor_ms=floor_ms,
        energy_mj_per_image=None if spent is None else spent / len(images),
        error=error,
        reason=reason,
    )


def line(row: Row, *, dense: Row) -> str:
    """One row as text, with the gains over dense."""
    where = f"{row.model:20} b{row.batch:<3}"
    if row.latency_ms is None or row.floor_ms is None or dense.latency_ms is None:
        return f"{where} -- {row.reason or dense.reason}"
    text = (
        f"{where} {row.latency_ms:8.3f} ms {dense.latency_ms / row.latency_ms:5.2f}x"
        f"  floor {row.floor_ms:7.3f} ms ({row.floor_ms / row.latency_ms:4.0%})"
        f"  error {row.error:.1e}"
    )
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
    roofline = measured_roofline(dtype=DTYPES[chosen.dtype])
    table = Table(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        dtype=chosen.dtype,
        peak_tflops=roofline.flops_per_s / 1e12,
        bandwidth_gb_s=roofline.bytes_per_s / 1e9,
        rows=[],
    )
    print(
        f"{table.device}: {table.peak_tflops:.0f} TFLOP/s {chosen.dtype}, "
        f"{table.bandwidth_gb_s:.0f} GB/s, both measured"
    )
    make = partial(deit_b, dtype=chosen.dtype)
    for batch in map(int, chosen.batches.split(",")):
        images = torch.randn(batch, 3, 224, 224).to("cuda", DTYPES[chosen.dtype])
        rows: list[Row] = []
        for name, entrant in entrants().items():
            tolerance = TOLERANCE[chosen.dtype]
            rows.append(
                measure(name, entrant, images, make=make, tolerance=tolerance, roofline=roofline)
            )
            print(line(rows[-1], dense=rows[0]), flush=True)
        table.rows.extend(rows)
    if chosen.json:
        chosen.json.write_bytes(msgspec.json.encode(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
