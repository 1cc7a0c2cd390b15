"""Two engines in one process: what each loses while the other works.

    python benchmarks/cpu_two_engines.py --out benchmarks/results/cpu_two_engines.json

DeiT-S in 64x1 at 50 %, float32, random weights, two engines of one thread each. Rounds alternate
between one engine alone and both at the same time, on a thread each. On two free cores a call
should take as long beside the other as alone; shared memory and caches are the machine's. CPU time
of the process for a call stands beside it, since other programs take cores: workers of one engine
that waited for those of the other would add to it.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_engine import MODELS, describe_machine
from benchmarks.vit_onnx import export_dense, write_sparse
from lpvit_engines import Engine, load_engine

WARM_UP = 2
CALLS = 3  # of an engine in a round


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(Path(folder), rounds=options.rounds)
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def measure(folder: Path, *, rounds: int) -> dict[str, Any]:
    dense, sparse = folder / "dense.onnx", folder / "sparse.onnx"
    export_dense(MODELS["deit_small"], dense)
    write_sparse(dense, sparse, block=(64, 1), sparsity=0.5)
    alone, beside = list[float](), list[float]()
    alone_cpu, beside_cpu = list[float](), list[float]()
    with (
        load_engine("openvino", sparse, threads=1) as first,
        load_engine("openvino", sparse, threads=1) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        for index in range(rounds + WARM_UP):
            starts = [time.process_time()]
            single = pool.submit(call_ms, first).result()
            starts.append(time.process_time())
            both = list(pool.map(call_ms, (first, second)))
            starts.append(time.process_time())
            if index >= WARM_UP:
                alone.append(single)
                beside.append(max(both))
                alone_cpu.append((starts[1] - starts[0]) * 1e3 / CALLS)
                beside_cpu.append((starts[2] - starts[1]) * 1e3 / CALLS / 2)
    low, _, high = statistics.quantiles((b / a for a, b in zip(alone, beside, strict=True)), n=4)
    return {
        "schema": "lpvit.bench.two_engines/1",
        "alone_ms": round(statistics.median(alone), 3),
        "beside_ms": round(statistics.median(beside), 3),  # the slower of the two
        "alone_cpu_ms": round(statistics.median(alone_cpu), 3),
        "beside_cpu_ms": round(statistics.median(beside_cpu), 3),
        "ratio": round(statistics.median(beside) / statistics.median(alone), 3),
        "ratio_quartiles": [round(low, 3), round(high, 3)],
        "rounds": rounds,
        "machine": describe_machine(),
    }


def call_ms(engine: Engine) -> float:
    """Of one call, over a few."""
    image = np.random.default_rng(0).standard_normal(engine.input_shape, dtype=np.float32)
    start = time.perf_counter()
    for _ in range(CALLS):
        engine.infer(image)
    return (time.perf_counter() - start) * 1e3 / CALLS


if __name__ == "__main__":
    main()
