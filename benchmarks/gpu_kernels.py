"""Block-sparse GPU kernels against dense cuBLAS, cuSPARSELt 2:4 and torch's bsr_dense_addmm.

    python -m benchmarks.gpu_kernels [--batches 1,8,32] [--json OUT.json]

For every linear layer of DeiT-B and DeiT-S: the time of one launch, the speed-up over dense cuBLAS,
and how close the time is to the floor that the device's own measured roofline sets. Every result is
compared with float32; a wrong one gets no time. This benchmark has not run on hardware yet.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import torch

from benchmarks import gpu_contestants as contestants
from benchmarks.gpu_contestants import Contestant, Problem
from benchmarks.gpu_timing import (
    Roofline,
    Timer,
    graph_us,
    measured_roofline,
    reason_of,
    refusals,
)
from lpvit_engines.cuda.manifest import DType

TOKENS = 197
WIDTHS = {"B": 768, "S": 384}
LAYERS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
BLOCKS = ((64, 64), (64, 32), (64, 16), (64, 8), (32, 32), (16, 16))
DENSITIES = (0.5, 0.3)
# The copies of the dense weight together. At the lowest density 154 MiB are left, three times the
# 50 MiB of an H100's L2 cache: no contestant may find its weights there.
COPIES_BYTES = 512 << 20
# float16 sums of 3072 products in float32, and the result rounded: see the error column.
TOLERANCE: dict[DType, float] = {"float16": 2e-3, "bfloat16": 1.6e-2}


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One contestant on one layer. time_us is None where there is no time, and reason says why."""

    layer: str
    batch: int
    kernel: str
    density: float | None
    time_us: float | None
    floor_us: float | None
    error: float | None
    reason: str | None


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the benchmark writes."""

    kind: Literal["gpu_kernels"] = "gpu_kernels"
    format: Literal[1] = 1
    device: str
    torch: str
    cuda: str
    dtype: str
    peak_tflops: float
    bandwidth_gb_s: float
    rows: list[Row]


def entrants() -> Iterator[tuple[str, Callable[[Problem], Contestant]]]:
    """Every kernel that is compared, dense first."""
    yield "dense cuBLAS", contestants.dense
    yield "2:4 cuSPARSELt", contestants.two_of_four
    for density in DENSITIES:
        for size in (64, 32, 16):
            enter = partial(contestants.torch_bsr, block=size, density=density)
            yield f"torch bsr {size}x{size} d={density}", enter
        for block in BLOCKS:
            enter = partial(contestants.ours, block=block, density=density)
            yield f"ours {block[0]}x{block[1]} d={density}", enter


def measure(
    name: str,
    enter: Callable[[Problem], Contestant],
    given: Problem,
    *,
    layer: str,
    batch: int,
    roofline: Roofline,
    timer: Timer = graph_us,
) -> Row:
    """One row. A library that refuses the layer gives a reason instead of a time."""
    try:
        contestant = enter(given)
        error = relative_error(contestant)
        wrong = not error <= TOLERANCE[given.dtype]
        time_us = None if wrong else timer(contestant.run, copies=given.copies)
    except refusals() as refused:
        return Row(
            layer=layer, batch=batch, kernel=name, density=None, time_us=None, floor_us=None,
            error=None, reason=reason_of(refused),
        )  # fmt: skip
    macs = given.weight.numel() * len(given.x) * contestant.density
    moved = contestant.weight_bytes + 2 * (given.x.numel() + contestant.expected.numel())
    return Row(
        layer=layer,
        batch=batch,
        kernel=name,
        density=contestant.density,
        time_us=time_us,
        floor_us=roofline.floor_us(macs=macs, moved_bytes=moved),
        error=error,
        reason="the result is wrong" if wrong else None,
    )


def relative_error(contestant: Contestant) -> float:
    found = contestant.run(0).float()
    return float((found - contestant.expected).abs().max() / contestant.expected.abs().max())


def copies_of(out_features: int, in_features: int) -> int:
    """How many copies of a half-precision weight the graph walks over."""
    return -(-COPIES_BYTES // (2 * out_features * in_features))


def bench_layer(
    layer: str, *, batch: int, dtype: DType, roofline: Roofline, timer: Timer = graph_us,
    device: str = "cuda",
) -> Iterator[Row]:  # fmt: skip
    """All contestants on one layer, such as "B qkv"."""
    model, name = layer.split()
    out_features, in_features = (factor * WIDTHS[model] for factor in LAYERS[name])
    given = contestants.problem(
        out_features=out_features,
        in_features=in_features,
        tokens=TOKENS * batch,
        dtype=dtype,
        copies=copies_of(out_features, in_features),
        device=device,
    )
    for kernel, enter in entrants():
        yield measure(
            kernel, enter, given, layer=layer, batch=batch, roofline=roofline, timer=timer
        )


def line(row: Row, *, dense_us: float | None) -> str:
    """One row as text."""
    where = f"{row.layer:7} b{row.batch:<3} {row.kernel:24}"
    if row.time_us is None or row.floor_us is None:
        return f"{where} -- {row.reason}"
    gain = f"{dense_us / row.time_us:5.2f}x" if dense_us else "    --"
    return (
        f"{where} {row.time_us:8.1f} us {gain}  floor {row.floor_us:7.1f} us "
        f"({row.floor_us / row.time_us:4.0%})  error {row.error:.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare block-sparse GPU kernels with dense and 2:4."
    )
    parser.add_argument("--models", default="B,S")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--dtype", default="float16", choices=list(TOLERANCE))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this benchmark measures, it does not estimate", file=sys.stderr)
        return 3
    roofline = measured_roofline(dtype=contestants.DTYPES[chosen.dtype])
    table = Table(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        dtype=chosen.dtype,
        peak_tflops=roofline.flops_per_s / 1e12,
        bandwidth_gb_s=roofline.bytes_per_s / 1e9,
        rows=[],
    )
    print(
        f"{table.device}: {table.peak_tflops:.0f} TFLOP/s {chosen.dtype}, "
        f"{table.bandwidth_gb_s:.0f} GB/s, both measured"
    )
    for model in chosen.models.split(","):
        for batch in map(int, chosen.batches.split(",")):
            for name in LAYERS:
                dense_us = None
                for row in bench_layer(
                    f"{model} {name}", batch=batch, dtype=chosen.dtype, roofline=roofline
                ):
                    dense_us = row.time_us if row.kernel == "dense cuBLAS" else dense_us
                    print(line(row, dense_us=dense_us), flush=True)
                    table.rows.append(row)
                torch.cuda.empty_cache()
    if chosen.json:
        chosen.json.write_bytes(msgspec.json.encode(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
