"""Accuracy after pruning without any retraining: lpvit-edge, LPViT, SparseGPT and two libraries.

    python -m benchmarks.pruning            the whole grid; goes on where it stopped
    python -m benchmarks.pruning --models my/model.toml --data my/images --out runs/mine.json
    python -m benchmarks.pruning --quick    one pattern, two methods, 500 images: under a minute
                                            (25 s on one core of an AMD EPYC, beside others)

The images: python examples/factory_line/generate.py --out data/factory_line
The peers:  pip install -e '.[bench]'

Every row is one model pruned by one method in one pattern to one share of the MACs, scored on
held-out images that no method has seen. Results go to benchmarks/results/pruning.json, with --quick
to runs/pruning_quick.json, anew each time; benchmarks/pruning_table.py makes tables and a picture.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

from benchmarks.gpu_rounds import reason_of, refusals
from benchmarks.pruning_methods import BLOCKS, METHODS, STRUCTURED
from benchmarks.pruning_rows import Row, Store, paired_drop
from benchmarks.pruning_subject import Source, Subject
from lpvit_edge.pattern import DENSE, parse_pattern

ROOT = Path(__file__).parent.parent
FACTORY_LINE = ROOT / "examples" / "factory_line" / "model.toml"
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
PATTERNS = (*BLOCKS, "2:4", STRUCTURED)
SEED = 0
# What each pattern is tried at.
RANGES = {
    "64x1": SPARSITIES,
    "64x16": SPARSITIES,
    "32x32": SPARSITIES,
    "64x64": SPARSITIES,
    "2:4": (0.5,),
    STRUCTURED: SPARSITIES[:5],
}
QUICK = {"models": [FACTORY_LINE], "patterns": ["64x1"], "methods": ["magnitude", "uniform"]}


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One row to be made."""

    method: str
    pattern: str
    sparsity: float


def cells(
    patterns: Sequence[str], methods: Sequence[str], sparsities: Sequence[float]
) -> Iterator[Cell]:
    """The grid: what a method does not know, and what a pattern is not tried at, is left out."""
    for pattern in patterns:
        for sparsity in sparsities:
            for method in methods:
                if pattern in METHODS[method].patterns and sparsity in RANGES[pattern]:
                    yield Cell(method=method, pattern=pattern, sparsity=sparsity)


def measured(subject: Subject, cell: Cell) -> Row:
    """Prune and score; a refusal becomes a row with its reason."""
    row = Row(model=subject.name, method=cell.method, pattern=cell.pattern, sparsity=cell.sparsity)
    method = METHODS[cell.method]
    if method.needs is not None and installed(method.needs) is None:
        return msgspec.structs.replace(row, reason=f"{method.needs} is not installed")
    pattern = DENSE if cell.pattern == STRUCTURED else parse_pattern(cell.pattern)
    torch.manual_seed(SEED)
    started = time.process_time()
    try:
        outcome = method.prunes(subject, pattern, cell.sparsity)
        seconds = time.process_time() - started
        right = subject.right(subject.logits(outcome.model))
    except refusals() as refused:
        return msgspec.structs.replace(row, reason=reason_of(refused))
    return msgspec.structs.replace(
        row,
        reached=removed_share(subject, outcome.model),
        seconds=seconds,
        distortion=outcome.distortion,
        **paired_drop(subject.dense_right, right),
    )


def removed_share(subject: Subject, model: torch.nn.Module) -> float:
    """Share of the prunable layers' MACs that went: zeros, and rows and columns taken out."""
    before = after = 0
    for layer in subject.walk.layers:
        before += layer.tokens * layer.in_features * layer.out_features
        weight = subject.linear(layer.name, of=model).weight
        after += layer.tokens * int(torch.count_nonzero(weight))
    return 1.0 - after / before


def installed(package: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def conditions(threads: int, commands: Sequence[str]) -> dict[str, object]:
    """How the rows were made; a grid may be made by several commands."""
    packages = ("torch", "timm", "numpy", "scipy", "nvidia-modelopt", "torch-pruning")
    return {
        "commands": list(dict.fromkeys([*commands, command("benchmarks.pruning")])),
        "versions": {name: installed(name) or "not installed" for name in packages},
        "seed": SEED,
        "threads": threads,
        "seconds_are": "CPU seconds of pruning over all threads, without the scoring",
    }


def command(module: str) -> str:
    """The command line as typed."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def run(given: argparse.Namespace, store: Store, sources: dict[str, Source]) -> None:
    """Every cell of the grid that the store does not hold."""
    for name, source in sources.items():
        wanted = [
            cell
            for cell in cells(given.patterns, given.methods, given.sparsities)
            if _blank(name, cell) not in store
        ]
        if not wanted:
            continue
        subject = source.subject([p for p in given.patterns if p in (*BLOCKS, "2:4")])
        dense = paired_drop(subject.dense_right, subject.dense_right)
        store.add(Row(model=name, method="dense", pattern="dense", sparsity=0.0, **dense))
        methods = {cell.method for cell in wanted}
        if methods & {"lpvit", "allocated_as_it_is"}:
            store.note(name, sensitivity_seconds=_curve_seconds(subject))
        if "uniform" in methods:
            _ = subject.rotated  # the same for every row: it counts for none
        if "allocated" in methods:
            store.note(name, rotated_sensitivity_seconds=_curve_seconds(subject.rotated))
        for number, cell in enumerate(wanted, 1):
            row = measured(subject, cell)
            store.add(row)
            print(f"{number}/{len(wanted)} {_line(row)}", flush=True)


def _curve_seconds(subject: Subject) -> float:
    """CPU seconds of the curves, which are then there and count for no single row."""
    started = time.process_time()
    _ = subject.curves
    return time.process_time() - started


def _blank(model: str, cell: Cell) -> Row:
    return Row(model=model, method=cell.method, pattern=cell.pattern, sparsity=cell.sparsity)


def _line(row: Row) -> str:
    what = f"{row.model} {row.method} {row.pattern} {row.sparsity:.0%}"
    if row.accuracy is None or row.seconds is None:
        return f"{what}: {row.reason}"
    return (
        f"{what}: {row.accuracy:.2%}, drop {row.drop:.2f} ({row.drop_low:.2f} to "
        f"{row.drop_high:.2f}), {row.reached:.1%} removed, {row.seconds:.1f} s"
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "factory_line")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument(
        "--models", nargs="+", type=Path, default=[FACTORY_LINE], help="model.toml files"
    )
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--calibration", type=int, default=256, help="images")
    parser.add_argument("--heldout", type=int, help="images; all of them when not given")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--again", nargs="+", choices=METHODS, default=(), help="make anew")
    parser.add_argument("--quick", action="store_true", help="a look, in under a minute")
    given = parser.parse_args()
    if given.quick:
        vars(given).update(QUICK, sparsities=[0.5], calibration=128, heldout=500, threads=1)
    default = "runs/pruning_quick.json" if given.quick else "benchmarks/results/pruning.json"
    given.out = given.out or ROOT / default
    return given


def main() -> None:
    given = parsed()
    torch.set_num_threads(given.threads)
    sources = {
        path.stem: Source(path, given.data, calibration=given.calibration, heldout=given.heldout)
        for path in given.models
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if given.quick:
        given.out.unlink(missing_ok=True)
    store = Store(given.out, {name: source.facts() for name, source in sources.items()})
    for method in given.again:
        store.forget(method, models=list(sources))
    run(given, store, sources)
    store.save(**conditions(given.threads, store.document.get("commands", [])))


if __name__ == "__main__":
    main()
