"""Which tile, warps, stages and schedule the block-sparse kernel should have on the GPU at hand.

    PYTHONPATH=.:engines python -m benchmarks.gpu_tune [--batches 1,8,32] [--json OUT.json]

For every layer, batch and block shape three races, each in alternating rounds (gpu_rounds.py):

    sieve       the kernel that ships against 18 combinations of tile, warps and stages
    schedules   the fastest of them against its persistent and split-K forms
    final       dense, and of every block shape the kernel that ships and the fastest found

Only the final's numbers are reported as gains: the winner of a race was chosen by its noise as well
as by its speed, so it is measured afresh. Needs triton and a GPU. This has not run on hardware yet.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from benchmarks.gpu_contestants import (
    DTYPES,
    BlockWeights,
    Contestant,
    Problem,
    block_weights,
    dense,
    shipped,
)
from benchmarks.gpu_kernels import BLOCKS, DENSE, LAYERS, TOLERANCE, Enter, bench, layer_problem
from benchmarks.gpu_machine import gpu_machine
from benchmarks.gpu_output import collected, ended, save, writable
from benchmarks.gpu_records import KernelRow, Setting, Trial, TuneRow, TuneTable
from benchmarks.gpu_rounds import ROUNDS, Probe, Spread, gain
from benchmarks.gpu_settings import grid_settings, launch, schedules_of
from benchmarks.gpu_tables import TUNE_HEAD, tune_line
from benchmarks.gpu_timing import Capture, Roofline, capture, measured_roofline, probe
from lpvit_edge.deps import require

SIEVE_ROUNDS = 7
Block = tuple[int, int]
Make = Callable[[Setting, BlockWeights, Problem], Contestant]


def tuned(setting: Setting, weights: BlockWeights, given: Problem) -> Contestant:
    """A setting as a contestant of gpu_kernels.py."""
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    return Contestant(
        run=lambda i: launch(setting, given.x, weights.copies[i], multiprocessors=cores),
        expected=weights.expected,
        density=weights.density,
        weight_bytes=weights.weight_bytes,
    )


def tune(
    given: Problem,
    *,
    layer: str,
    batch: int,
    density: float,
    roofline: Roofline,
    blocks: tuple[Block, ...] = BLOCKS,
    capture: Capture = capture,
    probe: Probe = probe,
    make: Make = tuned,
    rounds: int = ROUNDS,
) -> list[TuneRow]:
    """One row for every block shape that can be packed for this layer."""
    race = partial(
        bench, given, layer=layer, batch=batch, roofline=roofline, capture=capture, probe=probe
    )
    finalists: dict[str, Enter] = {DENSE: dense}
    trials: dict[Block, list[Trial]] = {}
    chosen: dict[Block, Setting | None] = {}
    for block in blocks:
        weights = block_weights(given, block=block, density=density)
        trials[block] = search(weights, given, race=race, make=make)
        chosen[block] = fastest(trials[block])
        finalists[f"shipped {text(block)}"] = partial(shipped, weights=weights)
        if (setting := chosen[block]) is not None:
            finalists[f"tuned {text(block)}"] = partial(make, setting, weights)
    final = {row.kernel: row for row in race(finalists, rounds=rounds)}
    best = fastest_block(final, blocks)
    return [
        row_of(block, chosen[block], trials[block], final, density=density, is_best=block == best)
        for block in blocks
    ]


def search(
    weights: BlockWeights,
    given: Problem,
    *,
    race: Callable[..., list[KernelRow]],
    make: Make,
) -> list[Trial]:
    """The sieve, then the schedules of its winner, which is measured again beside them."""
    sieve = trials_of(grid_settings(), weights, race=race, make=make)
    best = fastest(sieve)
    if best is None:
        return sieve
    # The first measurement of the winner gives way to that beside the schedules.
    rest = [trial for trial in sieve if trial.setting != best]
    return rest + trials_of([best, *schedules_of(best)], weights, race=race, make=make)


def trials_of(
    settings: list[Setting],
    weights: BlockWeights,
    *,
    race: Callable[..., list[KernelRow]],
    make: Make,
) -> list[Trial]:
    entrants = {s.name: partial(make, s, weights) for s in settings}
    rows = race({DENSE: dense, **entrants}, rounds=SIEVE_ROUNDS)
    return [
        Trial(setting=setting, time_us=row.time_us, reason=row.reason)
        for setting, row in zip(settings, rows[1:], strict=True)
    ]


def fastest(trials: list[Trial]) -> Setting | None:
    """The setting of the smallest median; None where none has a time."""
    timed = [(t.time_us.median, t.setting) for t in trials if t.time_us is not None]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def fastest_block(final: Mapping[str, KernelRow], blocks: tuple[Block, ...]) -> Block | None:
    """The block shape of the smallest median in the final, shipped or tuned."""
    medians = {
        block: timed.median
        for kind in ("shipped", "tuned")
        for block in blocks
        if (row := final.get(f"{kind} {text(block)}")) is not None
        and (timed := row.time_us) is not None
    }
    return min(medians, key=lambda block: medians[block]) if medians else None


def row_of(
    block: Block,
    setting: Setting | None,
    trials: list[Trial],
    final: Mapping[str, KernelRow],
    *,
    density: float,
    is_best: bool,
) -> TuneRow:
    ships, found = final[f"shipped {text(block)}"], final.get(f"tuned {text(block)}")
    over_shipped = None if found is None else gain(ships.rounds_us, found.rounds_us)
    return TuneRow(
        layer=ships.layer,
        batch=ships.batch,
        block=text(block),
        density=density,
        setting=setting,
        shipped_us=ships.time_us,
        tuned_us=None if found is None else found.time_us,
        over_shipped=over_shipped,
        over_dense=None if found is None else found.over_dense,
        floor_us=ships.floor_us,
        is_fastest=is_best,
        verdict=verdict(over_shipped, [found, ships], trials),
        trials=tuple(trials),
    )


def verdict(
    over_shipped: Spread | None, finalists: list[KernelRow | None], trials: list[Trial]
) -> str:
    """Better only where the lower quartile says so too; where there is no gain, why."""
    if over_shipped is not None:
        return "better" if over_shipped.low > 1 else "no better than what ships"
    rows = [row for row in finalists if row is not None]
    reasons = [row.reason for row in rows] + [trial.reason for trial in trials]
    return next((reason for reason in reasons if reason is not None), "not measured")


def text(block: Block) -> str:
    return f"{block[0]}x{block[1]}"


def tune_all(chosen: argparse.Namespace, *, roofline: Roofline) -> Iterator[list[TuneRow]]:
    """The rows of every layer, batch and density, printed as they are measured."""
    blocks = tuple(parsed_block(name) for name in chosen.blocks.split(","))
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    for model in chosen.models.split(","):
        for batch in map(int, chosen.batches.split(",")):
            for layer in (f"{model} {name}" for name in LAYERS):
                given = layer_problem(layer, batch=batch, dtype=chosen.dtype, l2_bytes=l2_bytes)
                for density in map(float, chosen.densities.split(",")):
                    print(f"\n{layer}, batch {batch}, density {density}\n{TUNE_HEAD}", flush=True)
                    rows = tune(
                        given, layer=layer, batch=batch, density=density, roofline=roofline,
                        blocks=blocks, rounds=chosen.rounds,
                    )  # fmt: skip
                    print(*map(tune_line, rows), sep="\n", flush=True)
                    yield rows
                    torch.cuda.empty_cache()


def parsed_block(name: str) -> Block:
    rows, cols = name.split("x")
    return int(rows), int(cols)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tune the block-sparse kernel on this GPU.")
    parser.add_argument("--models", default="B")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--blocks", default=",".join(map(text, BLOCKS)))
    parser.add_argument("--densities", default="0.5,0.3")
    parser.add_argument("--dtype", default="float16", choices=list(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=writable)
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: this benchmark measures, it does not estimate", file=sys.stderr)
        return 3
    require("triton")
    roofline = measured_roofline(dtype=DTYPES[chosen.dtype])
    # Asked for now: a device that was lost on the way answers no questions.
    device, machine = torch.cuda.get_device_name(), gpu_machine()
    cores = torch.cuda.get_device_properties(0).multi_processor_count

    def write(rows: tuple[TuneRow, ...], unfinished: str | None) -> None:
        table = TuneTable(
            command=" ".join(["python -m benchmarks.gpu_tune", *sys.argv[1:]]),
            device=device,
            machine=machine,
            multiprocessors=cores,
            torch=str(torch.__version__),  # a TorchVersion
            dtype=chosen.dtype,
            rounds=chosen.rounds,
            sieve_rounds=SIEVE_ROUNDS,
            peak_tflops=roofline.flops_per_s / 1e12,
            bandwidth_gb_s=roofline.bytes_per_s / 1e9,
            rows=rows,
            unfinished=unfinished,
        )
        save(table, chosen.json)

    _, unfinished = collected(tune_all(chosen, roofline=roofline), write=write)
    return ended(unfinished)


if __name__ == "__main__":
    sys.exit(main())
