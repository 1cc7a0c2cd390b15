"""What damping and the order of neurons and channels buy, on images that no other result uses.

G=examples/factory_line/generate.py
python $G --out data/tuning --calibration 512 --heldout 3000 --seed 4711
python benchmarks/pruning_settings.py --data data/tuning --out pruning_settings.json

Uniform pruning of the factory line's model without retraining. `kl` is the mean Kullback-Leibler
divergence of the pruned model's answer from the dense one's, which tells settings apart long before
accuracy does.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from lpvit_edge.images import read_all, scan_folder, take
from lpvit_edge.layers import walk
from lpvit_edge.models import LoadedModel, load_model
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, Settings, prune

MODEL = Path(__file__).parent.parent / "examples/factory_line/model.toml"
# Settings, pattern, sparsity, calibration images.
FORMS = (("64x1", 0.8), ("64x16", 0.6), ("2:4", 0.5), ("32x32", 0.5))
DAMPINGS = (1e-2, 1e-3, 1e-4, None)  # None: chosen for each layer
CASES: tuple[tuple[Settings, str, float, int], ...] = (
    *((Settings(damping=d), p, s, n) for n in (64, 256) for p, s in FORMS for d in DAMPINGS),
    *((Settings(permute=True), p, s, 256) for p, s in FORMS),
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


def measure(loaded: LoadedModel, data: Path) -> list[dict[str, Any]]:
    """One row for each case."""
    model = loaded.module
    found = walk(model, image_size=loaded.preprocess.image_size)
    tuning, targets = images_of(data / "heldout", loaded, limit=3000)
    dense = answers(model, tuning)
    rows = [{"accuracy": _accuracy(dense, targets), "settings": "dense"}]
    for settings, pattern, sparsity, count in CASES:
        images, _ = images_of(data / "calibration", loaded, limit=count)
        form = Form(pattern=parse_pattern(pattern), sparsity=sparsity)
        forms = {layer.name: form for layer in found.layers}
        *_, (_, pruned) = prune(model, found, forms, images, settings=settings)
        logits = answers(pruned, tuning)
        divergence = dense.softmax(1) * (dense.log_softmax(1) - logits.log_softmax(1))
        row = {
            "pattern": pattern,
            "sparsity": sparsity,
            "images": count,
            "damping": settings.damping,
            "permute": settings.permute,
            "accuracy": _accuracy(logits, targets),
            "kl": float(divergence.sum(1).mean()),
            "settings": msgspec.to_builtins(settings),
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def _accuracy(logits: Tensor, targets: Tensor) -> float:
    return round(float((logits.argmax(1) == targets).float().mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = measure(load_model(str(MODEL)), arguments.data)
    document = {"schema": "lpvit.bench.pruning_settings/1", "rows": rows}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
