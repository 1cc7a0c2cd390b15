"""What the pruning benchmark prunes: a trained model, its calibration and its held-out images."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lpvit_edge.errors import DataError
from lpvit_edge.images import ImageFolder, content_sha256, overlap, read_all, scan_folder, take
from lpvit_edge.layer_options import macs
from lpvit_edge.layers import Walk, walk
from lpvit_edge.models import LoadedModel, load_model
from lpvit_edge.pattern import Pattern, parse_pattern
from lpvit_edge.records import LayerShape, ModelIdentity, SensitivityCurve
from lpvit_edge.rotate import rotated
from lpvit_edge.sensitivity import Moments, gather_moments, layer_curves

_BATCH = 50  # images per forward pass: larger ones leave the cache, and take half as long again


class Subject:
    """One model with its images; what several methods need of it is computed once."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        walked: Walk,
        calibration: tuple[Tensor, Tensor],
        heldout: tuple[Tensor, Tensor],
        patterns: Sequence[str],
    ) -> None:
        self.name, self.module, self.walk = name, module, walked
        self.images, self.targets = calibration
        self.heldout, self.classes = heldout
        self.patterns = tuple(parse_pattern(pattern) for pattern in patterns)

    @cached_property
    def dense_logits(self) -> Tensor:
        """The dense model's answers on the held-out images: (n, classes)."""
        return self.logits(self.module)

    @property
    def dense_right(self) -> Tensor:
        """Which held-out images the dense model has right: (n,) bool."""
        return self.right(self.dense_logits)

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """One pass of gradients over the calibration images, shared by both criteria."""
        return gather_moments(
            self.module, self.walk, self.images, self.targets, patterns=self.patterns
        )

    @cached_property
    def curves(self) -> tuple[SensitivityCurve, ...]:
        """Distortion of every layer in every pattern, by both criteria."""
        return tuple(
            curve
            for layer in self.walk.layers
            for curve in layer_curves(
                layer, self.linear(layer.name), self.moments[layer.name], images=len(self.images)
            )
        )

    @cached_property
    def rotated(self) -> "Subject":
        """The same model in the basis in which lpvit-edge prunes it in blocks."""
        return Subject(
            self.name,
            rotated(self.module, self.walk, self.images),
            self.walk,
            (self.images, self.targets),
            (self.heldout, self.classes),
            [str(pattern) for pattern in self.patterns if pattern.kind == "block"],
        )

    def linear(self, name: str, *, of: nn.Module | None = None) -> nn.Linear:
        """One of the prunable layers, of this model or of a copy of it."""
        layer = (of or self.module).get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer

    def fitting(self, pattern: Pattern) -> tuple[LayerShape, ...]:
        """The layers that the pattern divides; the others stay dense."""
        layers = self.walk.layers
        return tuple(x for x in layers if pattern.fits(x.out_features, x.in_features))

    def raised(self, sparsity: float, layers: Iterable[LayerShape]) -> float:
        """What must go of these layers, so that this share of the MACs of all layers goes."""
        part = sum(macs(layer, 0.0) for layer in layers)
        return sparsity * sum(macs(layer, 0.0) for layer in self.walk.layers) / part

    def right(self, logits: Tensor) -> Tensor:
        """Which held-out images are answered right by logits (n, classes): (n,) bool."""
        return logits.argmax(1) == self.classes

    def divergence(self, logits: Tensor) -> float:
        """Kullback-Leibler divergence of logits (n, classes) from the dense ones, mean over n."""
        dense, pruned = self.dense_logits.log_softmax(1), logits.log_softmax(1)
        return float((dense.exp() * (dense - pruned)).sum(1).mean())

    def logits(self, model: nn.Module) -> Tensor:
        """What a model answers on the held-out images: (n, classes)."""
        with torch.inference_mode():
            return torch.cat([model(images) for images in batches(self.heldout, _BATCH)])


def batches(tensor: Tensor, size: int) -> list[Tensor]:
    """Slices of at most `size` along the first dimension."""
    return [tensor[start : start + size] for start in range(0, len(tensor), size)]


class Source:
    """Where a subject comes from, and the digests that say so."""

    def __init__(self, path: Path, data: Path, *, calibration: int, heldout: int | None) -> None:
        self.path = path
        self.loaded: LoadedModel = load_model(str(path))
        labels = self.loaded.labels
        self.calibration = take(scan_folder(data / "calibration", labels=labels), calibration)
        everything = scan_folder(data / "heldout", labels=labels)
        self.heldout = take(everything, heldout) if heldout else everything
        shared = overlap(self.calibration, self.heldout)
        if shared:
            raise DataError(f"{shared[0]} is among the held-out images too; draw disjoint splits")

    @property
    def identity(self) -> ModelIdentity:
        """Name, weights and image size."""
        return self.loaded.identity

    def facts(self) -> dict[str, str | int]:
        """What a result depends on."""
        return {
            "model_file": self.path.name,
            "weights_sha256": self.identity.weights_sha256,
            "calibration_images": len(self.calibration.paths),
            "calibration_sha256": content_sha256(self.calibration),
            "heldout_images": len(self.heldout.paths),
            "heldout_sha256": content_sha256(self.heldout),
        }

    def subject(self, patterns: Sequence[str]) -> Subject:
        """Read the images and walk the model."""
        size = self.loaded.preprocess.image_size
        return Subject(
            self.path.stem,
            self.loaded.module,
            walk(self.loaded.module, image_size=size),
            self._tensors(self.calibration),
            self._tensors(self.heldout),
            patterns,
        )

    def _tensors(self, folder: ImageFolder) -> tuple[Tensor, Tensor]:
        batch = read_all(folder, self.loaded.preprocess)
        if batch.targets is None or batch.skipped:
            raise DataError(
                f"{folder.folder}: {len(batch.skipped)} unreadable, or no class folders"
            )
        return torch.from_numpy(batch.images), torch.from_numpy(batch.targets)
