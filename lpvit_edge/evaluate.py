"""What a torch model answers on a folder of images."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import nn

from lpvit_edge.distributed import add_up, share
from lpvit_edge.errors import DataError
from lpvit_edge.floor import Paired
from lpvit_edge.images import Batch, ImageFolder, Preprocess, read_batches
from lpvit_edge.progress import track

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNREADABLE = -1
_BATCH = 32


def answers(
    model: nn.Module, images: ImageFolder, preprocess: Preprocess, *, what: str
) -> "NDArray[np.int64]":
    """The class that the model gives each image, (n,); UNREADABLE for a corrupt file.

    Several processes share the batches and all have the whole answer.
    """
    found = torch.zeros(len(images.paths), dtype=torch.int64)
    starts = share(range(0, len(images.paths), _BATCH))
    device = next(model.parameters()).device
    for start in track(starts, what=what, total=len(starts)):
        for indices, batch in _readable(images, preprocess, start):
            with torch.no_grad():
                logits = model(torch.from_numpy(batch.images).to(device))
            found[indices] = logits.argmax(1).cpu() - UNREADABLE
    add_up(found)
    return found.numpy() + UNREADABLE


def _readable(
    images: ImageFolder, preprocess: Preprocess, start: int
) -> "Iterator[tuple[list[int], Batch]]":
    """The images from `start` as one batch with their places, or one by one past a corrupt one."""
    places = list(range(start, min(start + _BATCH, len(images.paths))))
    (whole,) = read_batches(_only(images, places), preprocess, size=_BATCH)
    if len(whole.images) == len(places):
        yield places, whole
        return
    for place in places:
        (single,) = read_batches(_only(images, [place]), preprocess, size=1)
        if len(single.images):
            yield [place], single


def _only(images: ImageFolder, places: list[int]) -> ImageFolder:
    return msgspec.structs.replace(
        images, paths=tuple(images.paths[place] for place in places), targets=None
    )


def paired(dense: "NDArray[np.int64]", pruned: "NDArray[np.int64]", images: ImageFolder) -> Paired:
    """Right and wrong answers of two models on the images that could be read."""
    if images.targets is None:
        raise DataError(
            f"{images.folder}: an accuracy floor needs labelled held-out images, "
            "<folder>/<class>/<image>"
        )
    read = dense != UNREADABLE
    if not read.any():
        raise DataError(f"{images.folder}: none of {len(read)} files is a readable image")
    targets = np.asarray(images.targets)[read]
    before, after = dense[read] == targets, pruned[read] == targets
    return Paired(
        images=len(targets),
        dense_correct=int(before.sum()),
        correct=int(after.sum()),
        lost=int((before & ~after).sum()),
        won=int((after & ~before).sum()),
    )
