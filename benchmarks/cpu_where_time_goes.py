"""Where the time of a call goes: milliseconds by kind of node, by OpenVINO's performance counters.

    python benchmarks/cpu_where_time_goes.py --out benchmarks/results/cpu_where_time_goes.json

DeiT-B with random weights, dense and in 64x1 at 50 and 80 %, in float32, bf16 and int8, on one
thread. The counters time this engine's operators like OpenVINO's own nodes. A kind is the sum of
its nodes' medians over the counted calls; "outside the nodes" is the rest of the counted call.
Counting costs time itself: call_ms is the median of calls without it, and for comparing engines.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu_engine import MODELS, describe_machine, note
from benchmarks.vit_onnx import export_dense, write_sparse
from lpvit_engines import PRECISIONS, load_engine
from lpvit_engines.openvino_times import NodeTime, node_times

PATTERN = (64, 1)
WARM_UP = 2
OUTSIDE = "outside the nodes"
KINDS = (
    *("our linear layers", "our attention", "OpenVINO's linear layers", "OpenVINO's attention"),
    *("patch embedding", "LayerNorm", "element-wise", "the rest", OUTSIDE),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deit_base"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS["openvino"]))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.5, 0.8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(options, Path(folder))
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    print_table(document)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = []
    for model in options.models:
        dense = folder / f"{model}.onnx"
        note(f"exporting {model}")
        export_dense(MODELS[model], dense)
        for sparsity in options.sparsities:
            path = dense
            if sparsity > 0:
                path = folder / f"{model}-{sparsity}.onnx"
                write_sparse(dense, path, block=PATTERN, sparsity=sparsity)
            for precision in options.precisions:
                for threads in options.threads:
                    note(f"{model} at {sparsity:.0%} in {precision} on {threads} threads")
                    found = profile(path, precision, threads=threads, rounds=options.rounds)
                    about = {"model": model, "precision": precision, "threads": threads}
                    rows.append({**about, "sparsity": sparsity, **found})
    return {
        "schema": "lpvit.bench.cpu_time/1",
        "command": shlex.join(["python", *sys.argv]),
        "rows": rows,
        "rounds": options.rounds,
        "machine": describe_machine(),
    }


def profile(path: Path, precision: Any, *, threads: int, rounds: int) -> dict[str, Any]:
    """call_ms, counted_call_ms, its parts by kind, and the slowest nodes of what is no kind."""
    with load_engine("openvino", path, threads=threads, precision=precision) as engine:
        x = np.random.default_rng(0).standard_normal(engine.input_shape, dtype=np.float32)
        calls = []
        for _ in range(WARM_UP + rounds):
            start = time.perf_counter()
            engine.infer(x)
            calls.append((time.perf_counter() - start) * 1e3)
    counted = node_times(path, x, threads=threads, runs=rounds, precision=precision)
    kinds = dict.fromkeys(KINDS, 0.0)
    for node in counted.nodes:
        kinds[kind_of(node)] += node.median_ms
    kinds[OUTSIDE] = counted.median_ms - sum(kinds.values())
    return {
        "call_ms": round(statistics.median(calls[WARM_UP:]), 3),
        "counted_call_ms": round(counted.median_ms, 3),
        "kinds_ms": {kind: round(ms, 3) for kind, ms in kinds.items()},
        "the_rest": {
            node.name: f"{node.kernel} {node.median_ms:.3f} ms"
            for node in counted.nodes
            if kind_of(node) == "the rest" and node.median_ms > 0
        },
    }


def kind_of(node: NodeTime) -> str:
    """By the kernel, and where OpenVINO fused several by the name that timm gave the part.

    Of attention OpenVINO makes several nodes; the scale and shift of a LayerNorm it computes beside
    other element-wise work, under the LayerNorm's name.
    """
    engine, _, form = node.kernel.partition(" ")
    if engine.startswith("lpvit_"):
        return "our attention" if form.startswith("attention") else "our linear layers"
    if engine in ("FullyConnected", "MatMul") and "/attn/MatMul" not in node.name:
        return "OpenVINO's linear layers"
    if "/attn/" in node.name:
        return "OpenVINO's attention"
    if "patch_embed" in node.name:
        return "patch embedding"
    if engine == "MVN" or "norm" in node.name.lower():
        return "LayerNorm"
    return "element-wise" if engine in ("Subgraph", "Eltwise") else "the rest"


def print_table(document: dict[str, Any]) -> None:
    for row in document["rows"]:
        print(
            f"\n{row['model']} at {row['sparsity']:.0%} in {row['precision']}, {row['threads']} "
            f"threads: {row['call_ms']:.1f} ms, counted {row['counted_call_ms']:.1f}"
        )
        for kind, ms in row["kinds_ms"].items():
            if ms:
                print(f"  {kind:25} {ms:8.2f} ms  {ms / row['counted_call_ms']:6.1%}")


if __name__ == "__main__":
    main()
