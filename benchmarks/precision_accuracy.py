"""What bf16 and int8 cost in accuracy: dense.onnx and model.onnx of a run folder in each precision.

    python benchmarks/precision_accuracy.py runs/demo examples/factory_line/data/heldout

The run folder is what `lpvit optimize` leaves; the images are the held-out ones, a folder a class.
Nothing is timed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge import files
from lpvit_edge.images import read_batches, scan_folder
from lpvit_edge.run_folder import Run
from lpvit_engines import PRECISIONS, load_engine

FILES = ("dense.onnx", "model.onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="folder with run.json, dense.onnx and model.onnx")
    parser.add_argument("heldout", type=Path, help="held-out images, a subfolder per class")
    parser.add_argument("--out", type=Path, help="also write the document to this file")
    options = parser.parse_args()
    document = measure(options.run, options.heldout)
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    for row in document["rows"]:
        print(
            f"{row['file']:11} {row['precision']:8} {row['correct']:5} of {row['images']}  "
            f"{100 * row['accuracy']:6.2f} %  drop {row['drop_points']:+.2f} points  "
            f"other answers {row['other_answers']}  "
            f"largest logit error {row['largest_logit_error']:.4f}"
        )


def measure(run: Path, heldout: Path) -> dict[str, Any]:
    """A row for each file and precision; differences are against the same file in float32."""
    rows = []
    for name in FILES:
        reference, targets = logits_of(run, heldout, name, precision="float32")
        for precision in PRECISIONS["openvino"]:
            found, _ = logits_of(run, heldout, name, precision=precision)
            rows.append(
                {"file": name, "precision": precision, **compare(found, reference, targets)}
            )
    return {"schema": "lpvit.bench.precision/1", "rows": rows}


def logits_of(
    run: Path, heldout: Path, name: str, *, precision: str
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(images, classes) and the classes that are right, (images,)."""
    about = files.load(Run, run / "run.json")
    logits, targets = [], []
    with load_engine("openvino", run / name, precision=precision) as engine:
        for batch in read_batches(
            scan_folder(heldout, labels=about.labels), about.preprocess, size=16
        ):
            logits += [engine.infer(image[None])[0] for image in batch.images]
            assert batch.targets is not None
            targets.append(batch.targets)
    return np.stack(logits), np.concatenate(targets)


def compare(
    logits: NDArray[np.float32], reference: NDArray[np.float32], targets: NDArray[np.int64]
) -> dict[str, Any]:
    answers, before = logits.argmax(1), reference.argmax(1)
    correct, correct_before = int((answers == targets).sum()), int((before == targets).sum())
    return {
        "images": len(targets),
        "correct": correct,
        "accuracy": correct / len(targets),
        "drop_points": 100 * (correct_before - correct) / len(targets),
        "other_answers": int((answers != before).sum()),
        "largest_logit_error": float(np.abs(logits - reference).max() / np.abs(reference).max()),
    }


if __name__ == "__main__":
    main()
