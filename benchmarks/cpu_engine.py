"""The CPU engine against the best dense engine on this machine: one run, alternating calls.

    python benchmarks/cpu_engine.py --quick --json      DeiT-S, 50 and 80 %, under a minute
    python benchmarks/cpu_engine.py                     DeiT-S and DeiT-B, one and two threads
    python benchmarks/cpu_engine.py --precision bf16    the same in bfloat16
    python benchmarks/cpu_engine.py --precision int8 --nncf PYTHON
    python benchmarks/cpu_engine.py --patterns 64x1 64x64 --sparsities 0.5 0.6667

Every round calls each engine once, so a disturbance of the machine meets them all. dense_ms and
sparse_ms are medians over the rounds and speedup is their quotient; speedup_quartiles are those of
the rounds' own quotients. The baseline is the faster of OpenVINO, in the same precision, and ONNX
Runtime, whose CPU provider has no bfloat16 and stays float32. In int8 it is the fastest of OpenVINO
on models that NNCF quantised after training (PYTHON is an interpreter that has nncf), with the rest
in float32 and in bfloat16; this engine's own dense int8 is timed too, as dense_all_ms says.
CPU time of the process stands beside wall time: on one thread it tells the same story where other
programs take turns on the cores; on several, waiting workers add to it. dense_min_ms and
sparse_min_ms are the shortest calls of all rounds: what was least disturbed.
actual_sparsity is what a pattern reaches in whole blocks (6 columns of 64x64 have no 80 %), and
over_64x1 the time over that of 64x1 in the same rounds, where both leave out as much.
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
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dense_peers import Infer, onnxruntime_call, quantise, quantised_calls
from benchmarks.layer_roofline import measured_peak_gflops, roofline
from benchmarks.vit_onnx import Gemm, export_dense, write_sparse
from lpvit_engines import PRECISIONS, load_engine
from lpvit_engines.native import instruction_set

MODELS = {"deit_small": "deit_small_patch16_224", "deit_base": "deit_base_patch16_224"}
SPARSITIES = (0.5, 0.8)
OWN = "lpvit-dense"  # this engine on the dense model, in int8: named, but no baseline
Times = tuple[float, float]
Variant = tuple[str, float]  # pattern and sparsity


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
    parser.add_argument("--quick", action="store_true", help="DeiT-S, 64x1, all cores, no layers")
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
            found, dense_ms = compare(
                dense,
                files,
                quantised=quantised,
                threads=threads,
                rounds=options.rounds,
                precision=options.precision,
            )
            about = {"model": model, "precision": options.precision, "threads": threads}
            for row in sparse_rows(found, dense_ms, gemms):
                rows.append({**about, **row, "rounds": options.rounds})
        if not options.quick:
            measured = roofline(gemms, peak_gflops=peak, precision=options.precision)
            layers += [{"model": model, **row} for row in measured]
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
) -> tuple[dict[Variant, Path], dict[Variant, list[Gemm]]]:
    """A sparse file and its list of GEMMs for each (pattern, sparsity)."""
    files, gemms = dict[Variant, Path](), dict[Variant, list[Gemm]]()
    for pattern in patterns:
        rows, columns = map(int, pattern.split("x"))
        for sparsity in sparsities:
            key = (pattern, sparsity)
            files[key] = dense.with_name(f"{dense.stem}-{pattern}-{sparsity}.onnx")
            gemms[key] = write_sparse(dense, files[key], block=(rows, columns), sparsity=sparsity)
    return files, gemms


def compare(
    dense: Path,
    files: dict[Variant, Path],
    *,
    quantised: list[Path],
    threads: int,
    rounds: int,
    precision: str,
) -> tuple[dict[Any, list[Times]], dict[str, float]]:
    """Times of every sparse file and every dense engine, and the dense engines' medians in ms."""
    own = OWN if precision == "int8" else "openvino"  # which quantises nothing itself
    paths: dict[Any, Path] = {own: dense, **files}
    with ExitStack() as opened:
        calls: dict[Any, Infer] = {}
        for key, path in paths.items():
            engine = load_engine("openvino", path, threads=threads, precision=precision)
            calls[key] = opened.enter_context(engine).infer
        calls["onnxruntime"] = onnxruntime_call(dense, threads=threads)
        calls |= quantised_calls(quantised, threads=threads)
        times = alternate(calls, rounds=rounds)
    return times, {key: median_wall_ms(times[key]) for key in calls if key not in files}


def sparse_rows(
    times: dict[Any, list[Times]],
    dense_ms: dict[str, float],
    gemms: dict[Variant, list[Gemm]],
) -> Iterator[dict[str, Any]]:
    """One row for each sparse file, against the fastest dense engine of the same rounds."""
    baseline = min((key for key in dense_ms if key != OWN), key=dense_ms.__getitem__)
    actual = {key: actual_sparsity(layers) for key, layers in gemms.items()}
    for key in gemms:
        pattern, sparsity = key
        row: dict[str, Any] = {
            "pattern": pattern,
            "sparsity": sparsity,
            "actual_sparsity": round(actual[key], 4),
            "dense_engine": baseline,
            **quotient(times[baseline], times[key]),
            "dense_all_ms": {name: round(ms, 3) for name, ms in dense_ms.items()},
        }
        narrow = ("64x1", sparsity)
        if key != narrow and narrow in actual and abs(actual[narrow] - actual[key]) < 1e-3:
            row["over_64x1"] = spread(times[key], times[narrow])
        yield row


def actual_sparsity(layers: list[Gemm]) -> float:
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 1 - sum(layer.stored for layer in layers) / weights


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
    found = spread(dense, sparse)
    dense_ms, sparse_ms = median_wall_ms(dense), median_wall_ms(sparse)
    return {
        "dense_ms": round(dense_ms, 3),
        "sparse_ms": round(sparse_ms, 3),
        "speedup": found["ratio"],
        "speedup_quartiles": found["quartiles"],
        "dense_min_ms": round(min(wall for wall, _ in dense), 3),
        "sparse_min_ms": round(min(wall for wall, _ in sparse), 3),
        "dense_cpu_ms": round(statistics.median(cpu for _, cpu in dense), 3),
        "sparse_cpu_ms": round(statistics.median(cpu for _, cpu in sparse), 3),
    }


def spread(above: list[Times], below: list[Times]) -> dict[str, Any]:
    """Quotient of the medians of wall times, and the quartiles of the rounds' own quotients."""
    ratios = [a / b for (a, _), (b, _) in zip(above, below, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(median_wall_ms(above) / median_wall_ms(below), 3),
        "quartiles": [round(low, 3), round(high, 3)],
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
        "model       pattern  sparsity (actual)  threads  dense ms (engine)          sparse ms  "
        "speedup                CPU time  shortest  over 64x1"
    )
    for row in document["rows"]:
        low, high = row["speedup_quartiles"]
        over = row.get("over_64x1")
        print(
            f"{row['model']:11} {row['pattern']:8} {row['sparsity']:8.0%} "
            f"({row['actual_sparsity']:6.1%})  {row['threads']:7}  "
            f"{row['dense_ms']:8.1f} ({row['dense_engine']:11})  {row['sparse_ms']:11.1f}  "
            f"{row['speedup']:6.2f} ({low:.2f} to {high:.2f})  "
            f"{row['dense_cpu_ms'] / row['sparse_cpu_ms']:6.2f}    "
            f"{row['dense_min_ms'] / row['sparse_min_ms']:6.2f}      "
            + (f"{over['ratio']:.3f}" if over else "")
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
