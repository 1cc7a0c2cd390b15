"""What uniform pruning in 64x64 loses without a rotation, in which layers, and what lowers it.

    python -m benchmarks.pruning_coarse

In 64x64 a block of an attention's output projection reads one whole head of the example's model, so
a block that goes cuts a head off from 64 outputs. Plans with the same share of the MACs removed as
uniform 64x64, whose rows are in pruning.json: the projections dense and the other layers sparser
for it; the projections in 64x16; uniform 64x64 whose blocks are chosen with outputs weighed by diag
E[g^2]. Nothing is rotated: with a rotation, see pruning.json, none of this is needed. Rows go to
benchmarks/results/pruning_coarse.json one by one; rows that are there are not made again.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.pruning import FACTORY_LINE, ROOT, command, removed_share
from benchmarks.pruning_allocation import uniform_forms
from benchmarks.pruning_methods import repaired
from benchmarks.pruning_rows import paired_drop
from benchmarks.pruning_subject import Source, Subject
from lpvit_edge.files import write_atomic
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form
from lpvit_edge.sensitivity import output_fisher

COARSE, FINE = parse_pattern("64x64"), parse_pattern("64x16")
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
PROJECTION = ".attn.proj"
Forms = dict[str, Form]


def projections_dense(subject: Subject, sparsity: float) -> Forms:
    """The projections dense, the others sparser, so that as many MACs go."""
    others = [layer for layer in subject.walk.layers if not layer.name.endswith(PROJECTION)]
    form = Form(pattern=COARSE, sparsity=subject.raised(sparsity, others))
    return {layer.name: form for layer in others}


def projections_fine(subject: Subject, sparsity: float) -> Forms:
    """The projections in 64x16, a fourth of a head to a block."""
    fine, coarse = (Form(pattern=pattern, sparsity=sparsity) for pattern in (FINE, COARSE))
    layers = subject.walk.layers
    return {layer.name: fine if layer.name.endswith(PROJECTION) else coarse for layer in layers}


def outputs_weighed(subject: Subject, sparsity: float) -> nn.Module:
    """Uniform, an output counting by its mean squared loss gradient when blocks are chosen."""
    forms = uniform_forms(subject, COARSE, sparsity)
    return repaired(subject, forms, row_weights=output_fisher(subject.moments))


PLANS: dict[str, Callable[[Subject, float], nn.Module]] = {
    "outputs weighed": outputs_weighed,
    "projections dense": lambda subject, share: repaired(
        subject, projections_dense(subject, share)
    ),
    "projections 64x16": lambda subject, share: repaired(subject, projections_fine(subject, share)),
}


def shares(subject: Subject) -> dict[str, dict[str, float]]:
    """Of the distortion that the curves predict for uniform 64x64: the share of each kind."""
    curves = [c for c in subject.curves if c.criterion == "hessian" and c.pattern == str(COARSE)]
    found: dict[str, dict[str, float]] = {}
    for sparsity in SPARSITIES:
        parts: dict[str, float] = {}
        for curve in curves:
            kind = curve.layer.split(".", 2)[2]
            at = float(np.interp(sparsity, curve.sparsity, curve.distortion))
            parts[kind] = parts.get(kind, 0.0) + at
        whole = sum(parts.values())
        found[f"{sparsity:g}"] = {kind: part / whole for kind, part in parts.items()}
    return found


def measured(subject: Subject, plan: str, sparsity: float) -> dict[str, Any]:
    """One plan at one sparsity, scored on the held-out images."""
    model = PLANS[plan](subject, sparsity)
    return {
        "plan": plan,
        "sparsity": sparsity,
        "reached": removed_share(subject, model),
        **paired_drop(subject.dense_right, subject.right(subject.logits(model))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "factory_line")
    results = ROOT / "benchmarks" / "results" / "pruning_coarse.json"
    parser.add_argument("--out", type=Path, default=results)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = Source(FACTORY_LINE, given.data, calibration=256, heldout=None)
    subject = source.subject([str(COARSE)])
    document: dict[str, Any] = {"schema": "lpvit.bench.pruning_coarse/1", "rows": []}
    if given.out.exists():
        document = json.loads(given.out.read_text(encoding="utf-8"))
    document |= {"command": command("benchmarks.pruning_coarse"), "facts": source.facts()}
    document["shares_of_distortion"] = shares(subject)
    known = {(row["plan"], row["sparsity"]) for row in document["rows"]}
    for plan in PLANS:
        for sparsity in SPARSITIES:
            if (plan, sparsity) not in known:
                document["rows"].append(measured(subject, plan, sparsity))
                write_atomic(given.out, json.dumps(document, indent=1).encode() + b"\n")
                print(json.dumps(document["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
