"""What the deployed engine makes of the images it was checked on: the measure of all drift.

reference.json says what it was made from, reference.safetensors holds the arrays. The geometry of
the embedding (means, covariance) comes from the calibration images, the ranks from the held-out
ones, which the geometry has not seen.

Frames are compared with frames of the same predicted class only, so a line that makes one defect
in a hundred parts is judged rightly by a reference that holds every class equally often. Classes
with few held-out images share one category.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec
import numpy as np

from lpvit_edge import files
from lpvit_edge.deps import require
from lpvit_edge.drift import covariance
from lpvit_edge.drift.evidence import BINS, CHANNELS, bins_of
from lpvit_edge.drift.image_statistics import STATISTICS
from lpvit_edge.errors import DataError, FileFormatError
from lpvit_edge.records import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_IN_CATEGORY = 50
MOST_CATEGORIES = 33  # 32 classes of their own and the rest; 5 MB at 33
_LEAST_IN_CLASS = 5  # below it a class's mean is worse than the mean of all
_LEAST_IMAGES = 50


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the watch sees of frames: features (n, d), probabilities (n, C), statistics (n, 5)."""

    features: "NDArray[np.float32]"
    probabilities: "NDArray[np.float32]"
    statistics: "NDArray[np.float32]"


class ReferenceNote(Record, frozen=True, kw_only=True):
    """What a reference was made from, and how to know its arrays again."""

    KIND: ClassVar[str] = "drift-reference"

    onnx_sha256: str
    engine: str
    calibration_images: int
    heldout_images: int
    features: int
    classes: int
    shrinkage: float  # of the covariance towards a multiple of the identity, 0..1
    channels: tuple[str, ...]
    bins: int
    arrays_sha256: str


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """The arrays, with C classes, d features and K categories."""

    means: "NDArray[np.float32]"  # (C, d), of the predicted class
    whitening: "NDArray[np.float32]"  # (d, d)
    category_of: "NDArray[np.int64]"  # (C,)
    counts: "NDArray[np.int64]"  # (K, channels, BINS)
    statistics_mean: "NDArray[np.float32]"  # (K, 5)
    statistics_sd: "NDArray[np.float32]"  # (K, 5)

    def scores(
        self,
        features: "NDArray[np.float32]",
        probabilities: "NDArray[np.float32]",
        statistics: "NDArray[np.float32]",
    ) -> "tuple[int, NDArray[np.float64]]":
        """Category of one frame (d,), (C,), (5,) and its score in every channel (channels,)."""
        label = int(probabilities.argmax())
        distance = covariance.distance_per_feature(features, self.means[label], self.whitening)
        doubt = 1.0 - float(probabilities[label])
        return int(self.category_of[label]), np.array([distance, doubt, *statistics], np.float64)


def softmax(logits: "NDArray[np.floating]") -> "NDArray[np.float32]":
    """Probabilities (..., classes) of logits."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True), np.float32)


def build_reference(calibration: Seen, heldout: Seen) -> tuple[Reference, float]:
    """The reference and the shrinkage of its covariance.

    Raises DataError when there are too few images or the embeddings do not vary.
    """
    for name, seen in (("calibration", calibration), ("held-out", heldout)):
        if len(seen.features) < _LEAST_IMAGES:
            raise DataError(
                f"{len(seen.features)} {name} images are too few to know what is usual; give at "
                f"least {_LEAST_IMAGES}, better several hundred"
            )
    classes = calibration.probabilities.shape[1]
    predicted = calibration.probabilities.argmax(axis=1)
    means = covariance.class_means(
        calibration.features, predicted, count=classes, least=_LEAST_IN_CLASS
    )
    within = calibration.features - means[predicted]
    pooled, shrinkage = covariance.ledoit_wolf(within)
    labels = heldout.probabilities.argmax(axis=1)
    category_of = _categories(labels, classes)
    by_category = _by_category(heldout.statistics, category_of[labels])
    reference = Reference(
        means=np.asarray(means, np.float32),
        whitening=covariance.whitening(pooled),
        category_of=category_of,
        counts=np.zeros((int(category_of.max()) + 1, len(CHANNELS), BINS), np.int64),
        statistics_mean=np.stack([rows.mean(axis=0) for rows in by_category]),
        statistics_sd=np.stack([rows.std(axis=0) for rows in by_category]),
    )
    rows = np.arange(len(CHANNELS))
    for frame in zip(heldout.features, heldout.probabilities, heldout.statistics, strict=True):
        category, scores = reference.scores(*frame)
        reference.counts[category, rows, bins_of(scores)] += 1
    return reference, shrinkage


def _categories(labels: "NDArray[np.integer]", classes: int) -> "NDArray[np.int64]":
    """A category for each class: its own where enough held-out images fell into it, else 0."""
    counts = np.bincount(labels, minlength=classes)
    frequent = [int(c) for c in np.argsort(-counts) if counts[c] >= LEAST_IN_CATEGORY]
    category_of = np.zeros(classes, np.int64)
    for number, label in enumerate(sorted(frequent[: MOST_CATEGORIES - 1]), start=1):
        category_of[label] = number
    return category_of


def _by_category(
    values: "NDArray[np.float32]", categories: "NDArray[np.int64]"
) -> "list[NDArray[np.float32]]":
    """The rows (n, 5) of each category; all rows where it has few."""
    chosen = [values[categories == k] for k in range(int(categories.max()) + 1)]
    return [rows if len(rows) >= _LEAST_IN_CLASS else values for rows in chosen]


def save_reference(
    reference: Reference,
    folder: Path,
    *,
    onnx_sha256: str,
    engine: str,
    images: tuple[int, int],
    shrinkage: float,
    name: str = "reference",
) -> ReferenceNote:
    """Write NAME.safetensors and then NAME.json, whose presence says it is whole."""
    arrays = {name: np.ascontiguousarray(getattr(reference, name)) for name in _FIELDS}
    path = folder / f"{name}.safetensors"
    # save_file() makes it readable for its owner alone, and the service is another user.
    files.write_atomic(path, require("safetensors.numpy").save(arrays))
    note = ReferenceNote(
        onnx_sha256=onnx_sha256,
        engine=engine,
        calibration_images=images[0],
        heldout_images=images[1],
        features=reference.means.shape[1],
        classes=reference.means.shape[0],
        shrinkage=shrinkage,
        channels=tuple(channel.name for channel in CHANNELS),
        bins=BINS,
        arrays_sha256=files.sha256_of(path),
    )
    files.save(note, folder / f"{name}.json")
    return note


_FIELDS = Reference.__struct_fields__


def load_reference(folder: Path) -> tuple[Reference, ReferenceNote]:
    """Read a reference back. Raises FileFormatError for arrays that are not what the note says."""
    note = files.load(ReferenceNote, folder / "reference.json")
    path = folder / "reference.safetensors"
    if not path.is_file() or files.sha256_of(path) != note.arrays_sha256:
        raise FileFormatError(
            f"{path}: absent, or not the file that reference.json is about; run `lpvit check` again"
        )
    if note.channels != tuple(c.name for c in CHANNELS) or note.bins != BINS:
        raise FileFormatError(
            f"{folder / 'reference.json'}: made by another version of lpvit-edge (channels "
            f"{', '.join(note.channels)}); run `lpvit check` again"
        )
    arrays = require("safetensors.numpy").load_file(path)
    if set(arrays) != set(_FIELDS):
        raise FileFormatError(f"{path}: holds {sorted(arrays)}, expected {sorted(_FIELDS)}")
    reference = Reference(**arrays)
    problem = _problem(reference, note)
    if problem:
        raise FileFormatError(f"{path}: {problem}; run `lpvit check` again")
    return reference, note


def _problem(reference: Reference, note: ReferenceNote) -> str | None:
    C, d, K = note.classes, note.features, reference.counts.shape[0]
    shapes = {
        "means": (C, d),
        "whitening": (d, d),
        "category_of": (C,),
        "counts": (K, len(CHANNELS), BINS),
        "statistics_mean": (K, len(STATISTICS)),
        "statistics_sd": (K, len(STATISTICS)),
    }
    for name, shape in shapes.items():
        array = getattr(reference, name)
        if array.shape != shape:
            return f"{name} has shape {array.shape}, expected {shape}"
        if not np.isfinite(array).all():
            return f"{name} holds numbers that are not finite"
    if reference.counts.min() < 0 or reference.category_of.min() < 0:
        return "counts and categories must not be negative"
    if reference.category_of.max() >= K:
        return f"a class has category {reference.category_of.max()}, there are {K}"
    return None


def gather(frames: Iterable[tuple["NDArray[np.uint8]", dict[str, "NDArray[np.float32]"]]]) -> Seen:
    """What the watch sees of (picture (H, W, 3), outputs of infer_all for it), one after another.

    Raises DataError when there is no frame.
    """
    from lpvit_edge.drift.image_statistics import image_statistics

    rows = [
        (out["features"][0], softmax(out["logits"][0]), image_statistics(pixels))
        for pixels, out in frames
    ]
    if not rows:
        raise DataError("there is no readable image, so there is nothing to refer to")
    features, probabilities, statistics = (np.stack(column) for column in zip(*rows, strict=True))
    return Seen(features=features, probabilities=probabilities, statistics=statistics)


def rows_of(seen: Seen) -> "Iterator[tuple[NDArray[np.float32], ...]]":
    """Frame by frame: features (d,), probabilities (C,), statistics (5,)."""
    yield from zip(seen.features, seen.probabilities, seen.statistics, strict=True)
