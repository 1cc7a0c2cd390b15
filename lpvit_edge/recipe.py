"""How a pruned model is fine-tuned, and the record of it: finetune.json."""

from pathlib import Path
from typing import ClassVar

from lpvit_edge import files
from lpvit_edge.records import ModelIdentity, Part, Record


class Recipe(Part, frozen=True, kw_only=True):
    """What decides the outcome of a fine-tuning, beside the weights and the images."""

    epochs: int
    batch: int  # images of one step, of all processes together
    learning_rate: float
    weight_decay: float
    soft: float  # weight of the divergence from the dense model's probabilities
    hard: float  # weight of the cross entropy with the dense model's answer
    labels: float  # weight of the cross entropy with the labels, where there are any
    temperature: float  # of the soft part
    seed: int
    images_sha256: str
    start_sha256: str  # of the pruned weights


class FinetuneEpoch(Part, frozen=True, kw_only=True):
    """Mean losses over one epoch, before their weights."""

    epoch: int
    soft: float
    hard: float
    labels: float
    learning_rate: float  # at its last step
    seconds: float


class FinetuneLog(Record, frozen=True, kw_only=True):
    """How the weights of model.safetensors went on after pruning."""

    KIND: ClassVar[str] = "finetune"

    model: ModelIdentity
    recipe: Recipe
    images: int
    skipped: tuple[str, ...]  # images that could not be read, with the reason
    processes: int
    device: str
    history: tuple[FinetuneEpoch, ...]
    masked_weights: int  # weights that pruning removed, all zero after every epoch
    accuracy_before: float | None  # on the held-out images, by torch; None without labels
    accuracy_after: float | None
    heldout_images: int
    model_sha256: str


def current(folder: Path, model_sha256: str) -> FinetuneLog | None:
    """finetune.json, if it is about these weights."""
    path = folder / "finetune.json"
    if not path.exists():
        return None
    log = files.load(FinetuneLog, path)
    return log if log.model_sha256 == model_sha256 else None
