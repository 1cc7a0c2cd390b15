"""The CPU engine against the best dense engine on this machine: one run, alternating calls.

    python benchmarks/cpu_engine.py --quick --json      DeiT-S, 50 and 80 %, under a minute
    python benchmarks/cpu_engine.py                     DeiT-S and DeiT-B, one and two threads
    python benchmarks/cpu_engine.py --precision bf16    the same in bfloat16
    python benchmarks/cpu_engine.py --precision int8 --nncf PYTHON

Every round calls each engine once, so a disturbance of the machine meets them all. dense_ms and
sparse_ms are medians over the rounds and speedup is their quotient; speedup_quartiles are those of
the rounds' own quotients. The baseline is the faster of OpenVINO, in the same precision, and ONNX
Runtime, whose CPU provider has no bfloat16 and stays float32. In int8 it is the fastest of OpenVINO
on models that NNCF quantised after training (PYTHON is an interpreter that has nncf), with the rest
in float32 and in bfloat16; this engine's own dense int8 is timed too, as dense_all_ms says.
CPU time of the process stands beside wall time: on one thread it tells the same story where other
programs take turns on the cores; on several, waiting workers add to it. dense_min_ms and
sparse_min_ms are the shortest calls of all rounds: what was least disturbed.
Weights are random: speed is measured here, nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dense_peers import Infer, onnxruntime_call, quantise, quantised_calls
from benchmarks.layer_roofline import measured_peak_gflops, roofline
from benchmarks.vit_onnx import export_dense, write_sparse
from lpvit_engines import PRECISIONS, Engine, load_engine
from lpvit_engines.native import instruction_set

MODELS = {"deit_small": "deit_small_patch16_224", "deit_base": "deit_base_patch16_224"}
SPARSITIES = (0.5, 0.8)
OWN = "lpvit-dense"  # this engine on the dense model, in int8: named, but no baseline
Times = tuple[float, float]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(options, Path(folder))
    text = json.dumps(document, indent=None if options.json else 1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        print_table(document)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="DeiT-S, 64x1, all cores, few rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", choices=PRECISIONS["openvino"], default="float32")
    parser.add_argument("--patterns", nargs="+", default=["64x1", "64x16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, os.cpu_count() or 1])
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--nncf", type=Path, metavar="PYTHON", help="for --precision int8")
    parser.add_argument(
        "--quantised", nargs="+", type=Path, default=[], help="for one model, instead of --nncf"
    )
    options = parser.parse_args()
    if options.precision == "int8" and options.nncf is None and not options.quantised:
        parser.error("int8 needs its peer: --nncf PYTHON, an interpreter that has nncf")
    if options.quantised and len(options.models) > 1:
        parser.error("--quantised is one model's: name that one with --models")
    if options.quick:
        options.models, options.patterns = ["deit_small"], ["64x1"]
        options.threads = [os.cpu_count() or 1]
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    peak = measured_peak_gflops(options.precision)
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    for model in options.models:
        dense = folder / f"{model}.onnx"
        note(f"exporting {model}")
        export_dense(MODELS[model], dense)
        files, gemms = write_variants(dense, options.patterns, options.sparsities)
        quantised = quantise(dense, python=options.nncf) if options.nncf else options.quantised
        for threads in dict.fromkeys(options.threads):
            note(f"timing {model} on {threads} threads, {options.rounds} rounds")
            rows += compare(
                model,
                dense,
                files,
                quantised=quantised,
                threads=threads,
                rounds=options.rounds,
                precision=options.precision,
            )
        if not options.quick:
            found = roofline(gemms, peak_gflops=peak, precision=options.precision)
            layers += [{"model": model, **row} for row in found]
    return {
        "schema": "lpvit.bench.cpu/1",
        "rows": rows,
        "layers": layers,
        "isa": instruction_set(options.precision),
        "peak_gflops_one_core": round(peak, 1),
        "machine": describe_machine(),
    }


def write_variants(
    dense: Path, patterns: list[str], sparsities: list[float]
) -> tuple[dict[tuple[str, float], Path], dict[tuple[str, float], Any]]:
    """A sparse file and its list of GEMMs for each (pattern, sparsity)."""
    files, gemms = {}, {}
    for pattern in patterns:
        rows, columns = map(int, pattern.split("x"))
        for sparsity in sparsities:
            key = (pattern, sparsity)
            files[key] = dense.with_name(f"{dense.stem}-{pattern}-{sparsity}.onnx")
            gemms[key] = write_sparse(dense, files[key], block=(rows, columns), sparsity=sparsity)
    return files, gemms


def compare(
    model: str,
    dense: Path,
    files: dict[tuple[str, float], Path],
    *,
    quantised: list[Path],
    threads: int,
    rounds: int,
    precision: str,
) -> list[dict[str, Any]]:
    """One row for each sparse file, against the fastest dense engine of the same rounds."""
    own = OWN if precision == "int8" else "openvino"  # which quantises nothing itself
    paths: dict[Any, Path] = {own: dense, **files}
    engines: dict[Any, Engine] = {
        key: load_engine("openvino", path, threads=threads, precision=precision)
        for key, path in paths.items()
    }
    calls: dict[Any, Infer] = {key: engine.infer for key, engine in engines.items()}
    calls["onnxruntime"] = onnxruntime_call(dense, threads=threads)
    calls |= quantised_calls(quantised, threads=threads)
    times = alternate(calls, rounds=rounds)
    dense_ms = {key: median_wall_ms(times[key]) for key in calls if key not in files}
    baseline = min((key for key in dense_ms if key != OWN), key=dense_ms.__getitem__)
    for engine in engines.values():
        engine.close()
    return [
        {
            "model": model,
            "precision": precision,
            "pattern": pattern,
            "sparsity": sparsity,
            "threads": threads,
            "dense_engine": baseline,
            **quotient(times[baseline], times[(pattern, sparsity)]),
            "rounds": rounds,
            "dense_all_ms": {key: round(ms, 3) for key, ms in dense_ms.items()},
        }
        for pattern, sparsity in files
    ]


def alternate(calls: dict[Any, Infer], *, rounds: int) -> dict[Any, list[Times]]:
    """(wall ms, CPU ms of the process) of each call in each round, after two rounds of warm-up."""
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    times: dict[Any, list[Times]] = {key: [] for key in calls}
    for index in range(rounds + 2):
        for key, call in calls.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            call(image)
            cpu_ms = (time.process_time() - cpu_start) * 1e3
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if index >= 2:
                times[key].append((elapsed_ms, cpu_ms))
    return times


def quotient(dense: list[Times], sparse: list[Times]) -> dict[str, Any]:
    """Medians, their quotient, the quartiles of the rounds' quotients, and CPU time."""
    ratios = [d / s for (d, _), (s, _) in zip(dense, sparse, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    dense_ms, sparse_ms = median_wall_ms(dense), median_wall_ms(sparse)
    return {
        "dense_ms": round(dense_ms, 3),
        "sparse_ms": round(sparse_ms, 3),
        "speedup": round(dense_ms / sparse_ms, 3),
        "speedup_quartiles": [round(low, 3), round(high, 3)],
        "dense_min_ms": round(min(wall for wall, _ in dense), 3),
        "sparse_min_ms": round(min(wall for wall, _ in sparse), 3),
        "dense_cpu_ms": round(statistics.median(cpu for _, cpu in dense), 3),
        "sparse_cpu_ms": round(statistics.median(cpu for _, cpu in sparse), 3),
    }


def median_wall_ms(times: list[Times]) -> float:
    return statistics.median(wall for wall, _ in times)


def describe_machine() -> dict[str, Any]:
    """What the figures depend on; the load average says whether others were at work."""
    from importlib.metadata import version

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "openvino": version("openvino"),
        "onnxruntime": version("onnxruntime"),
    }


def print_table(document: dict[str, Any]) -> None:
    print(
        "model       pattern  sparsity  threads  dense ms (engine)          sparse ms  speedup",
        end="",
    )
    print("                CPU time  shortest")
    for row in document["rows"]:
        low, high = row["speedup_quartiles"]
        print(
            f"{row['model']:11} {row['pattern']:8} {row['sparsity']:8.0%}  {row['threads']:7}  "
            f"{row['dense_ms']:8.1f} ({row['dense_engine']:11})  {row['sparse_ms']:11.1f}  "
            f"{row['speedup']:6.2f} ({low:.2f} to {high:.2f})  "
            f"{row['dense_cpu_ms'] / row['sparse_cpu_ms']:6.2f}    "
            f"{row['dense_min_ms'] / row['sparse_min_ms']:6.2f}"
        )
    print(f"\none core: {document['isa']}, peak {document['peak_gflops_one_core']} GF/s")
    for row in document["layers"]:
        print(
            f"{row['model']:11} {row['pattern']:8} {row['sparsity']:8.0%}  "
            f"{row['in_features']:4} to {row['out_features']:4}  {row['layer_ms']:7.3f} ms  "
            f"{row['gflops']:6.1f} GF/s  {row['of_peak']:.0%} of peak"
        )


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
