"""What matching outputs after pruning buys: the same pruned models, before and after.

    python examples/factory_line/generate.py --out data/factory_line
    python -m benchmarks.pruning_matching --data data/factory_line

Uniform pruning with 256 calibration images and no labels; 2,000 held-out images that neither has
seen. `kl` is the mean Kullback-Leibler divergence from the dense model's answers. Rows go to
benchmarks/results/pruning_matching.json one by one; rows that are there are not made again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.pruning import FACTORY_LINE, ROOT, command
from benchmarks.pruning_allocation import uniform_forms
from benchmarks.pruning_methods import repaired
from benchmarks.pruning_rows import paired_drop
from benchmarks.pruning_subject import Source, Subject, batches
from lpvit_edge.files import write_atomic
from lpvit_edge.match_outputs import match_outputs
from lpvit_edge.pattern import parse_pattern

CASES = (("64x16", 0.6), ("64x64", 0.5))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(n, classes)."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in batches(images, 50)])


def scored(subject: Subject, dense: Tensor, model: nn.Module) -> dict[str, Any]:
    """Drop with its interval, and the divergence from the dense answers (n, classes)."""
    found = logits(model, subject.heldout)
    right = found.argmax(1) == subject.classes
    divergence = functional.kl_div(
        found.log_softmax(1), dense.log_softmax(1), reduction="batchmean", log_target=True
    )
    return {**paired_drop(dense.argmax(1) == subject.classes, right), "kl": float(divergence)}


def measure(subject: Subject, pattern: str, sparsity: float) -> dict[str, Any]:
    """One case, before and after."""
    dense = logits(subject.module, subject.heldout)
    forms = uniform_forms(subject, parse_pattern(pattern), sparsity)
    pruned = repaired(subject, forms)
    started = time.process_time()
    matched = match_outputs(subject.module, pruned, subject.walk, subject.images)
    return {
        "pattern": pattern,
        "sparsity": sparsity,
        "before": scored(subject, dense, pruned),
        "after": scored(subject, dense, matched.model),
        "kept_step": matched.kept_step,
        "parameters": matched.parameters,
        "loss_apart_before": matched.loss_before,
        "loss_apart_after": matched.loss_after,
        "cpu_seconds": time.process_time() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "factory_line")
    parser.add_argument("--model", type=Path, default=FACTORY_LINE)
    results = ROOT / "benchmarks" / "results" / "pruning_matching.json"
    parser.add_argument("--out", type=Path, default=results)
    given = parser.parse_args()
    source = Source(given.model, given.data, calibration=256, heldout=None)
    subject = source.subject(())
    rows: list[dict[str, Any]] = []
    if given.out.exists():
        rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"]
    known = {(row["pattern"], row["sparsity"]) for row in rows}
    for pattern, sparsity in CASES:
        if (pattern, sparsity) in known:
            continue
        rows.append(measure(subject, pattern, sparsity))
        document = {
            "schema": "lpvit.bench.pruning_matching/1",
            "command": command("benchmarks.pruning_matching"),
            "facts": source.facts(),
            "rows": rows,
        }
        write_atomic(given.out, json.dumps(document, indent=1).encode() + b"\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
