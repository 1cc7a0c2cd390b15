"""What damping, rotation, the order of channels and the outputs' Fisher information buy.

G=examples/factory_line/generate.py
python $G --out data/tuning --calibration 512 --heldout 3000 --seed 4711
python -m benchmarks.pruning_settings --data data/tuning

Uniform pruning of the factory line's model without retraining, on images that no other result uses.
`kl` is the mean Kullback-Leibler divergence of the pruned model's answer from the dense one's,
which tells settings apart long before accuracy does. Every row is on disk at once, in
benchmarks/results/pruning_settings.json, and is not made again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from lpvit_edge.files import write_atomic
from lpvit_edge.images import read_all, scan_folder, take
from lpvit_edge.layers import walk
from lpvit_edge.models import LoadedModel, load_model
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, Settings, prune
from lpvit_edge.rotate import rotated
from lpvit_edge.sensitivity import gather_moments, output_fisher

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "examples/factory_line/model.toml"


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One way to prune."""

    pattern: str
    sparsity: float
    images: int = 256  # for calibration
    damping: float = 1e-3
    permute: bool = False
    fisher: bool = False  # weigh the outputs by diag E[g g^T] when blocks are chosen
    rotated: bool = False


FORMS = (("64x16", 0.6), ("2:4", 0.5), ("32x32", 0.5), ("64x1", 0.8))
MORE_FORMS = (("64x64", 0.6), ("32x4", 0.7))
CASES = (
    *(
        Case(pattern=pattern, sparsity=sparsity, permute=permute)
        for pattern, sparsity in FORMS
        for permute in (False, True)
    ),
    *(Case(pattern=p, sparsity=s, fisher=True) for p, s in FORMS if p != "2:4"),
    *(
        Case(pattern=p, sparsity=s, images=n, damping=damping)
        for (p, s), n in zip(FORMS, (256, 64, 256, 64), strict=True)
        for damping in (1e-2, 1e-3, 1e-4)
        if (n, damping) != (256, 1e-3)
    ),
    *(Case(pattern=p, sparsity=s) for p, s in MORE_FORMS),
    *(Case(pattern=p, sparsity=s, rotated=True) for p, s in (*FORMS, *MORE_FORMS)),
    *(
        Case(pattern=p, sparsity=s, rotated=True, damping=damping)
        for p, s in (("64x16", 0.6), ("64x1", 0.8))
        for damping in (1e-2, 1e-4)
    ),
    *(
        Case(pattern=p, sparsity=s, rotated=True, permute=True)
        for p, s in (("64x16", 0.6), ("32x32", 0.5), ("64x1", 0.8))
    ),
)


def images_of(folder: Path, loaded: LoadedModel, *, limit: int) -> tuple[Tensor, Tensor]:
    """Images (n, 3, S, S) and classes (n,)."""
    batch = read_all(take(scan_folder(folder, labels=loaded.labels), limit), loaded.preprocess)
    assert batch.targets is not None
    return torch.from_numpy(batch.images), torch.from_numpy(batch.targets)


def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (n, classes)."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.tensor_split(max(1, len(images) // 100))])


def measure(loaded: LoadedModel, data: Path, known: list[dict[str, Any]]) -> Iterator[Any]:
    """One row for each case that is not known yet, the dense model's first."""
    model = loaded.module
    walked = walk(model, image_size=loaded.preprocess.image_size)
    tuning, targets = images_of(data / "heldout", loaded, limit=3000)
    dense = answers(model, tuning)
    if not known:
        yield {"case": "dense", "accuracy": _accuracy(dense, targets)}
    for case in CASES:
        if msgspec.to_builtins(case) in (row["case"] for row in known):
            continue
        images, classes = images_of(data / "calibration", loaded, limit=case.images)
        model = rotated(loaded.module, walked, images) if case.rotated else loaded.module
        form = Form(pattern=parse_pattern(case.pattern), sparsity=case.sparsity)
        weights = None
        if case.fisher:
            weights = output_fisher(gather_moments(model, walked, images, classes, patterns=()))
        *_, (_, pruned) = prune(
            model,
            walked,
            {layer.name: form for layer in walked.layers},
            images,
            settings=Settings(damping=case.damping, permute=case.permute),
            row_weights=weights,
        )
        logits = answers(pruned, tuning)
        divergence = dense.softmax(1) * (dense.log_softmax(1) - logits.log_softmax(1))
        yield {
            "case": msgspec.to_builtins(case),
            "accuracy": _accuracy(logits, targets),
            "kl": float(divergence.sum(1).mean()),
        }


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    return round(float((logits.argmax(1) == targets).float().mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    results = ROOT / "benchmarks/results/pruning_settings.json"
    parser.add_argument("--out", type=Path, default=results)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if given.out.exists():
        rows = json.loads(given.out.read_text(encoding="utf-8"))["rows"]
    for row in measure(load_model(str(MODEL)), given.data, list(rows)):
        rows.append(row)
        document = {
            "schema": "lpvit.bench.pruning_settings/2",
            "command": "python -m benchmarks.pruning_settings --data data/tuning",
            "rows": rows,
        }
        write_atomic(given.out, json.dumps(document, indent=1).encode() + b"\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
