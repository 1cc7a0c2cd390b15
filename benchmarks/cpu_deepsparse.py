"""The CPU engine against DeepSparse on the same network at the same sparsity, in alternating calls.

    python benchmarks/cpu_deepsparse.py --deepsparse PYTHON --out cpu_deepsparse.json

PYTHON is an interpreter with deepsparse 1.8, which pins versions that this project cannot have; its
licence allows evaluation. Each engine gets the form it likes best: DeepSparse unstructured zeros in
ONNX opset 16, this engine blocks of 64x1. Both in float32, batch 1, 224 px, random weights. The two
processes take turns: one waits while the other computes, and a pause before each call lets the
other's workers come to rest. Speed is measured here, nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_engine import MODELS, SPARSITIES, describe_machine, note
from benchmarks.vit_onnx import export_dense, export_unstructured, write_sparse
from lpvit_engines import Engine, load_engine

WARM_UP = 2
# Worker threads go on spinning after a call, on the cores that the next call needs, for a time that
# neither engine documents.
PAUSE_S = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deepsparse", type=Path, metavar="PYTHON", required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    document = {
        "schema": "lpvit.bench.deepsparse/1",
        "rows": rows,
        "pause_s": PAUSE_S,
        "deepsparse": version(options.deepsparse),
        "machine": describe_machine(),
    }
    for row in measured(options):
        rows.append(row)
        if options.out is not None:  # DeepSparse takes minutes to compile: keep what is done
            options.out.write_text(json.dumps(document, indent=1) + "\n")
        low, high = row["speedup_quartiles"]
        print(
            f"{row['model']:11} {row['sparsity']:4.0%}  {row['threads']} threads  DeepSparse "
            f"{row['deepsparse_ms']:7.1f} ms  lpvit 64x1 {row['lpvit_ms']:7.1f} ms  "
            f"{row['speedup']:5.2f} ({low:.2f} to {high:.2f})",
            flush=True,
        )


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            yield from compare(model, options, Path(folder))


def version(python: Path) -> str:
    code = "from importlib.metadata import version; print(version('deepsparse'))"
    words = [str(python), "-c", code]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def compare(model: str, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    dense = folder / f"{model}.onnx"
    note(f"exporting {model}")
    export_dense(MODELS[model], dense)
    for sparsity in SPARSITIES:
        ours, theirs = folder / "64x1.onnx", folder / "unstructured.onnx"
        write_sparse(dense, ours, block=(64, 1), sparsity=sparsity)
        export_unstructured(MODELS[model], theirs, sparsity=sparsity)
        for threads in dict.fromkeys(options.threads):
            note(f"timing {model} at {sparsity:.0%} on {threads} threads")
            with (
                deepsparse_call(theirs, python=options.deepsparse, threads=threads) as peer,
                load_engine("openvino", ours, threads=threads) as engine,
            ):
                times = alternate(peer, engine, rounds=options.rounds)
            yield {"model": model, "sparsity": sparsity, "threads": threads, **quotient(times)}


@contextmanager
def deepsparse_call(path: Path, *, python: Path, threads: int) -> Iterator[Callable[[], float]]:
    """A call that runs DeepSparse once in its own process and returns its wall time in ms."""
    script = Path(__file__).with_name("deepsparse_worker.py")
    worker = subprocess.Popen(
        [str(python), str(script), str(path), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "NM_DISABLE_ANALYTICS": "1"},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None

    def call() -> float:
        print(file=worker.stdin, flush=True)
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"DeepSparse ended on {path}; its message stands above")
        return float(line)

    try:
        yield call
    finally:
        worker.stdin.close()
        worker.wait()
        worker.stdout.close()


def alternate(
    peer: Callable[[], float], engine: Engine, *, rounds: int
) -> list[tuple[float, float]]:
    """(DeepSparse's ms, ours) of each round, after the warm-up."""
    image = np.random.default_rng(0).standard_normal(engine.input_shape, dtype=np.float32)
    times = []
    for _ in range(WARM_UP + rounds):
        time.sleep(PAUSE_S)
        peer_ms = peer()
        time.sleep(PAUSE_S)
        start = time.perf_counter()
        engine.infer(image)
        times.append((peer_ms, (time.perf_counter() - start) * 1e3))
    return times[WARM_UP:]


def quotient(times: list[tuple[float, float]]) -> dict[str, Any]:
    low, _, high = statistics.quantiles((theirs / ours for theirs, ours in times), n=4)
    theirs_ms = statistics.median(theirs for theirs, _ in times)
    ours_ms = statistics.median(ours for _, ours in times)
    return {
        "deepsparse_ms": round(theirs_ms, 3),
        "lpvit_ms": round(ours_ms, 3),
        "deepsparse_min_ms": round(min(theirs for theirs, _ in times), 3),
        "lpvit_min_ms": round(min(ours for _, ours in times), 3),
        "speedup": round(theirs_ms / ours_ms, 3),
        "speedup_quartiles": [round(low, 3), round(high, 3)],
        "rounds": len(times),
    }


if __name__ == "__main__":
    main()
