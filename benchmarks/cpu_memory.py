"""Resident memory of DeiT-B, dense and sparse, each engine in a process of its own.

    python benchmarks/cpu_memory.py --out benchmarks/results/cpu_memory.json

A process loads one model, answers two images and reads its own /proc/self/status; rows are medians
over the repeats. Beside the engine's own dense form stand OpenVINO on the same network saved in
its own format, whose weights are mapped from the file, and ONNX Runtime. The least of the dense
forms is the base of of_dense. Python and OpenVINO are in every figure (the row "import": Python).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cpu_engine import MODELS, describe_machine, note
from benchmarks.vit_onnx import export_dense, write_sparse
from lpvit_engines import PRECISIONS

FIELDS = {"VmRSS": "resident_mib", "RssAnon": "anonymous_mib", "VmHWM": "peak_mib"}
CHILD = """
import sys
from pathlib import Path
import numpy as np
from benchmarks.cpu_memory import FIELDS, caller
call = caller(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else None
for _ in range(2 if call else 0):
    call(np.zeros((1, 3, 224, 224), np.float32))
for line in Path("/proc/self/status").read_text().splitlines():
    name, _, value = line.partition(":")
    if name in FIELDS:
        print(FIELDS[name], int(value.split()[0]) / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="deit_base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(options.model, Path(folder), repeats=options.repeats)
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["rows"]:
        print(
            f"{row['form']:9} {row['engine']:22} {row['resident_mib']:7.0f} MiB resident  "
            f"{row['of_dense']:5.2f} of dense  {row['anonymous_mib']:7.0f} anonymous  "
            f"{row['peak_mib']:7.0f} at most"
        )


def measure(model: str, folder: Path, *, repeats: int) -> dict[str, Any]:
    dense = folder / "dense.onnx"
    export_dense(MODELS[model], dense)
    forms = {"dense": dense}
    for sparsity in (0.5, 0.8):
        forms[f"{sparsity:.0%}"] = folder / f"{sparsity}.onnx"
        write_sparse(dense, forms[f"{sparsity:.0%}"], block=(64, 1), sparsity=sparsity)
    rows = [{"form": "import", "engine": "none", **resident(repeats=repeats)}]
    for engine, path in {"openvino-mapped": saved(dense), "onnxruntime": dense}.items():
        rows.append({"form": "dense", "engine": engine, **resident(path, engine, repeats=repeats)})
    for precision in PRECISIONS["openvino"]:
        for form, path in forms.items():
            note(f"{form} in {precision}")
            found = resident(path, precision, repeats=repeats)
            rows.append({"form": form, "engine": f"lpvit-{precision}", **found})
    # The dense engine of float32: in int8 the dense form is this project's as well.
    base = min(row["resident_mib"] for row in rows if is_dense_float32(row))
    for row in rows:
        row["of_dense"] = round(row["resident_mib"] / base, 3)
    return {
        "schema": "lpvit.bench.memory/1",
        "model": model,
        "repeats": repeats,
        "rows": rows,
        "machine": describe_machine(),
    }


def is_dense_float32(row: dict[str, Any]) -> bool:
    return row["form"] == "dense" and row["engine"] not in ("lpvit-bf16", "lpvit-int8")


def resident(*arguments: Path | str, repeats: int) -> dict[str, Any]:
    """Medians over fresh processes."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        words = [sys.executable, "-c", CHILD, *map(str, arguments)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            name, value = line.split()
            found.setdefault(name, []).append(float(value))
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def saved(dense: Path) -> Path:
    """The same network in OpenVINO's own format."""
    import openvino

    path = dense.with_suffix(".xml")
    openvino.save_model(openvino.Core().read_model(dense), path, compress_to_fp16=False)
    return path


def caller(path: Path, engine: str) -> Any:
    """The engine's call on an image; everything that it holds stays alive with it. One thread."""
    if engine == "onnxruntime":
        from benchmarks.dense_peers import onnxruntime_call

        return onnxruntime_call(path, threads=1)
    from lpvit_engines import load_engine

    precision = "float32" if engine == "openvino-mapped" else engine
    return load_engine("openvino", path, threads=1, precision=precision).infer


if __name__ == "__main__":
    main()
