"""Block-sparse GPU kernels against dense cuBLAS, cuSPARSELt 2:4 and torch's bsr_dense_addmm.

    python -m benchmarks.gpu_kernels [--batches 1,8,32] [--json OUT.json]

For every linear layer of DeiT-B and DeiT-S: all contestants are captured as CUDA graphs, then
replayed in turns. The table shows the median and the quartiles of the time of one launch and of the
gains within a round over dense cuBLAS and over torch's block-sparse kernel, and how close the time
is to the floor that the device's own measured roofline sets. Every result is compared with float32
before and after the rounds; a wrong one gets no time. This has not run on hardware yet.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch

from benchmarks import gpu_contestants as contestants
from benchmarks.gpu_contestants import Contestant, Problem
from benchmarks.gpu_goals import kernel_goals
from benchmarks.gpu_machine import gpu_machine
from benchmarks.gpu_output import collected, ended, save, with_common, without
from benchmarks.gpu_records import KernelRow, KernelTable
from benchmarks.gpu_rounds import (
    ROUNDS,
    WRONG,
    Entry,
    Probe,
    Refused,
    Result,
    entered,
    excuse,
    gain,
    nothing,
    race,
    refusals,
    spread,
)
from benchmarks.gpu_tables import KERNEL_HEAD, goal_line, kernel_line
from benchmarks.gpu_timing import Capture, Roofline, capture, measured_roofline, probe
from lpvit_engines.cuda.manifest import DType

TOKENS = 197
WIDTHS = {"B": 768, "S": 384}
LAYERS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}
BLOCKS = ((64, 64), (64, 32), (64, 16), (64, 8), (32, 32), (16, 16))
DENSITIES = (0.5, 0.3)
BSR_STAGES = (3, 5, 7)
DENSE = "dense cuBLAS"
# No contestant may find its weights in the L2 cache: at the lowest density the copies together are
# so many times its size.
CACHES = 3
# float16 sums of 3072 products in float32, and the result rounded: see the error column.
TOLERANCE: dict[DType, float] = {"float16": 2e-3, "bfloat16": 1.6e-2}
Enter = Callable[[Problem], Contestant]


def entrants() -> Iterator[tuple[str, Enter]]:
    """Every kernel that is compared, dense first."""
    yield DENSE, contestants.dense
    yield "2:4 cuSPARSELt", contestants.two_of_four
    for density in DENSITIES:
        for size in (64, 32, 16):
            weights = cache(partial(contestants.bsr_weights, block=size, density=density))
            bsr = partial(contestants.torch_bsr, weights=weights)
            yield f"torch bsr {size}x{size} d={density}", bsr
            for stages in BSR_STAGES:
                yield f"torch bsr {size} d={density} s={stages}", partial(bsr, stages=stages)
            yield f"torch bsr {size} d={density} opt", partial(bsr, tuned=True)
        for block in BLOCKS:
            enter = partial(contestants.ours, block=block, density=density)
            yield f"ours {block[0]}x{block[1]} d={density}", enter


def copies_of(out_features: int, in_features: int, *, l2_bytes: int) -> int:
    """How many copies of a half-precision weight the graph walks over."""
    kept_bytes = 2 * out_features * in_features * min(DENSITIES)
    return -(-CACHES * l2_bytes // int(kept_bytes))


def layer_problem(
    layer: str, *, batch: int, dtype: DType, l2_bytes: int, device: str = "cuda"
) -> Problem:
    """The tensors of one layer, such as "B qkv"."""
    model, name = layer.split()
    out_features, in_features = (factor * WIDTHS[model] for factor in LAYERS[name])
    return contestants.problem(
        out_features=out_features,
        in_features=in_features,
        tokens=TOKENS * batch,
        dtype=dtype,
        copies=copies_of(out_features, in_features, l2_bytes=l2_bytes),
        device=device,
    )


def bench(
    given: Problem,
    entrants: Mapping[str, Enter],
    *,
    layer: str,
    batch: int,
    roofline: Roofline,
    capture: Capture = capture,
    probe: Probe = probe,
    rounds: int = ROUNDS,
) -> list[KernelRow]:
    """One row for every contestant, all captured first and then measured in turns. A library that
    refuses the layer gives a reason instead of a time; one that loses the device DeviceLostError.
    """
    tolerance = TOLERANCE[given.dtype]
    made: dict[str, Contestant | Refused] = {
        name: made_of(name, enter, given, probe=probe) for name, enter in entrants.items()
    }
    entries: dict[str, Entry | Refused] = {
        name: found
        if isinstance(found, Refused)
        else entered(
            name, partial(ready, found, given, capture=capture), tolerance=tolerance, probe=probe
        )
        for name, found in made.items()
    }
    results = race(entries, rounds=rounds, tolerance=tolerance, probe=probe)
    return [
        row_of(
            name,
            results,
            known={n: c for n, c in made.items() if isinstance(c, Contestant)},
            given=given,
            layer=layer,
            batch=batch,
            roofline=roofline,
        )
        for name in entrants
    ]


def made_of(
    name: str, enter: Enter, given: Problem, *, probe: Probe = nothing
) -> Contestant | Refused:
    try:
        made = enter(given)
        probe()  # what its tensors' kernels did wrong would else be found at the next contestant
    except refusals() as refused:
        return Refused(reason=excuse(name, refused, probe))
    return made


def ready(contestant: Contestant, given: Problem, *, capture: Capture) -> Entry | Refused:
    """Captured, and first compared with float32: what computes nonsense is not even captured."""
    first = relative_error(contestant.run(0), contestant)
    if not first <= TOLERANCE[given.dtype]:
        return Refused(reason=WRONG, error=first)
    graph = capture(contestant.run, copies=given.copies)
    return Entry(sample=graph.sample_us, error=lambda: relative_error(graph.result, contestant))


def relative_error(found: Any, contestant: Contestant) -> float:
    difference = (found.float() - contestant.expected).abs().max()
    return float(difference / contestant.expected.abs().max())


def row_of(
    name: str,
    results: Mapping[str, Result],
    *,
    known: Mapping[str, Contestant],
    given: Problem,
    layer: str,
    batch: int,
    roofline: Roofline,
) -> KernelRow:
    """A contestant's row, with its gains over those it is compared with."""
    found, contestant = results[name], known.get(name)
    density = None if contestant is None else contestant.density
    peer = bsr_peer(results, known, density=density) if name.startswith("ours") else None
    return KernelRow(
        layer=layer,
        batch=batch,
        kernel=name,
        density=density,
        time_us=spread(found.samples),
        over_dense=gain(results[DENSE].samples, found.samples),
        over_bsr=None if peer is None else gain(results[peer].samples, found.samples),
        bsr_peer=peer,
        floor_us=None if contestant is None else floor_us(contestant, given, roofline=roofline),
        error=found.error,
        copies=given.copies,
        rounds_us=found.samples,
        reason=found.reason,
    )


def bsr_peer(
    results: Mapping[str, Result], known: Mapping[str, Contestant], *, density: float | None
) -> str | None:
    """The fastest of torch's block-sparse kernels at a density, whatever its block."""
    medians = {
        name: timed.median
        for name, found in results.items()
        if name.startswith("torch bsr")
        and name in known
        and known[name].density == density
        and (timed := spread(found.samples)) is not None
    }
    return min(medians, key=lambda name: medians[name]) if medians else None


def floor_us(contestant: Contestant, given: Problem, *, roofline: Roofline) -> float:
    macs = given.weight.numel() * len(given.x) * contestant.density
    moved = contestant.weight_bytes + 2 * (given.x.numel() + contestant.expected.numel())
    return roofline.floor_us(macs=macs, moved_bytes=moved)


def bench_all(
    chosen: argparse.Namespace, *, roofline: Roofline, l2_bytes: int
) -> Iterator[list[KernelRow]]:
    """The rows of every layer of the models at every batch, printed as they are measured."""
    for model in chosen.models.split(","):
        for batch in map(int, chosen.batches.split(",")):
            for name in LAYERS:
                layer = f"{model} {name}"
                given = layer_problem(layer, batch=batch, dtype=chosen.dtype, l2_bytes=l2_bytes)
                print(f"\n{layer}, batch {batch}, {chosen.rounds} rounds in turns\n{KERNEL_HEAD}")
                rows = bench(
                    given, without(dict(entrants()), chosen.skip), layer=layer, batch=batch,
                    roofline=roofline, rounds=chosen.rounds,
                )  # fmt: skip
                print(*map(kernel_line, rows), sep="\n", flush=True)
                yield rows
                torch.cuda.empty_cache()


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare block-sparse GPU kernels with dense and 2:4."
    )
    parser.add_argument("--models", default="B,S")
    return with_common(parser, dtypes=list(TOLERANCE))


def main() -> int:
    chosen = arguments().parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this benchmark measures, it does not estimate", file=sys.stderr)
        return 3
    roofline = measured_roofline(dtype=contestants.DTYPES[chosen.dtype])
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    print(
        f"{torch.cuda.get_device_name()}: {roofline.flops_per_s / 1e12:.0f} TFLOP/s "
        f"{chosen.dtype}, {roofline.bytes_per_s / 1e9:.0f} GB/s, both measured"
    )
    # Asked for now: a device that was lost on the way answers no questions.
    device, cuda = torch.cuda.get_device_name(), str(torch.version.cuda)
    machine = gpu_machine()

    def write(rows: tuple[KernelRow, ...], unfinished: str | None) -> None:
        table = KernelTable(
            command=" ".join(["python -m benchmarks.gpu_kernels", *sys.argv[1:]]),
            device=device,
            machine=machine,
            torch=str(torch.__version__),  # a TorchVersion
            cuda=cuda,
            dtype=chosen.dtype,
            rounds=chosen.rounds,
            peak_tflops=roofline.flops_per_s / 1e12,
            bandwidth_gb_s=roofline.bytes_per_s / 1e9,
            l2_mib=l2_bytes / 2**20,
            rows=rows,
            goals=kernel_goals(rows) if chosen.dtype == "float16" else (),
            unfinished=unfinished,
        )
        save(table, chosen.json)

    parts = bench_all(chosen, roofline=roofline, l2_bytes=l2_bytes)
    rows, unfinished = collected(parts, write=write)
    if chosen.dtype == "float16":
        print("", *map(goal_line, kernel_goals(rows)), sep="\n")
    return ended(unfinished)


if __name__ == "__main__":
    sys.exit(main())
