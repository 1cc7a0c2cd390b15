"""What every step works on: one model, its images, this machine, one run folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.errors import DataError
from lpvit_edge.images import ImageFolder, class_names, overlap, refuse_alike, scan_folder, take
from lpvit_edge.pattern import refuse_unrunnable

if TYPE_CHECKING:
    from lpvit_edge.layers import Walk
    from lpvit_edge.models import LoadedModel


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One model, its images, this machine, and the folder in which everything ends up."""

    model: "LoadedModel"
    walk: "Walk"
    calibration: ImageFolder
    heldout: ImageFolder
    folder: Path
    engine: str = "openvino"
    threads: int = 1
    patterns: tuple[str, ...] = ("64x1", "64x16", "32x32")
    device: str = "cpu"  # that torch prunes on, see lpvit_edge.torch_device
    basis_sha256: str | None = None  # of the file that `model` was rotated by, see lpvit_edge.basis

    def path(self, name: str) -> Path:
        """A file of the run folder."""
        return self.folder / name


def prepare(
    model: "LoadedModel",
    folder: Path,
    *,
    calibration: Path | None,
    heldout: Path | None,
    images: int,
    engine: str,
    threads: int,
    patterns: tuple[str, ...],
    device: str = "cpu",
) -> Job:
    """Find the images and walk the model.

    Raises DataError when a folder is missing, empty, shares images with the other, or its class
    folders are not the model's classes; PruningError when a pattern divides no layer or the images
    are too few.
    """
    from lpvit_edge.layers import walk
    from lpvit_edge.prune_refusals import refuse_few_images, refuse_useless_patterns

    refuse_unrunnable(patterns, engine=engine)
    heldout_images = scan_folder(_given(heldout, "heldout"), labels=model.labels)
    # Without labels in the model file the held-out folders name the classes, for both sets:
    # a calibration set that lacks a class must not shift the others.
    labels = _class_order(model, heldout_images)
    calibration_images = scan_folder(_given(calibration, "calibration"), labels=labels)
    walked = walk(model.module, image_size=model.preprocess.image_size)
    refuse_useless_patterns(walked.layers, patterns)
    _refuse_wrong_classes(model, heldout_images)
    chosen = take(calibration_images, images)
    refuse_few_images(walked.layers, len(chosen.paths))
    refuse_alike(chosen, model.preprocess)
    shared = overlap(chosen, heldout_images)
    if shared:
        raise DataError(
            f"{len(shared)} calibration images are also held out ({shared[0]} ...): accuracy would "
            "be measured on images that pruning has seen; give disjoint folders"
        )
    return Job(
        model=model,
        walk=walked,
        calibration=chosen,
        heldout=heldout_images,
        folder=folder,
        engine=engine,
        threads=threads,
        patterns=patterns,
        device=device,
    )


def prepare_without_images(
    model: "LoadedModel", folder: Path, *, engine: str, threads: int, patterns: tuple[str, ...]
) -> Job:
    """Walk the model only: all that measuring the device needs."""
    from lpvit_edge.layers import walk
    from lpvit_edge.prune_refusals import refuse_useless_patterns

    refuse_unrunnable(patterns, engine=engine)
    walked = walk(model.module, image_size=model.preprocess.image_size)
    refuse_useless_patterns(walked.layers, patterns)
    none = ImageFolder(folder=folder, paths=(), targets=None)
    return Job(
        model=model,
        walk=walked,
        calibration=none,
        heldout=none,
        folder=folder,
        engine=engine,
        threads=threads,
        patterns=patterns,
    )


def class_order(job: Job) -> tuple[str, ...] | None:
    """The classes in the order of the model's outputs, by which every folder is read."""
    return _class_order(job.model, job.heldout)


def _class_order(model: "LoadedModel", heldout: ImageFolder) -> tuple[str, ...] | None:
    return model.labels or class_names(heldout.folder)


def _given(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise DataError(
            f"no {name} images; pass --{name} FOLDER or set [data] {name} in the model's TOML file"
        )
    return folder


def _refuse_wrong_classes(model: "LoadedModel", images: ImageFolder) -> None:
    import torch

    from lpvit_edge.layers import example_images

    with torch.no_grad():
        outputs = model.module(example_images(model.preprocess.image_size, batch=1)).shape[-1]
    found = len(model.labels) if model.labels else len(set(images.targets or ()))
    if images.targets is not None and found != outputs:
        raise DataError(
            f"the model has {outputs} outputs but there are {found} classes in "
            f"{'its `labels`' if model.labels else images.folder}; name all of them, in the order "
            "of the outputs, as `labels` in the model's TOML file"
        )


def available_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
