"""Quick looks at a model in torch: masks without repair, accuracy on some images."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from lpvit_edge.images import ImageFolder, Preprocess, read_batches, take
from lpvit_edge.prune import Form, block_sums
from lpvit_edge.repair import choose_mask, expand


def masked_by_magnitude(model: nn.Module, forms: Mapping[str, Form]) -> nn.Module:
    """A copy whose smallest blocks are zero: as fast as the repaired one, not as accurate."""
    masked = copy.deepcopy(model)
    for name, form in forms.items():
        weight = masked.get_parameter(f"{name}.weight")
        sums = block_sums(weight.detach().square(), form.pattern)
        mask = choose_mask(sums, form.pattern, sparsity=form.sparsity)
        with torch.no_grad():
            weight.mul_(expand(mask, form.pattern))
    return masked


def torch_accuracy(
    model: nn.Module, images: ImageFolder, preprocess: Preprocess, *, limit: int
) -> tuple[float | None, int]:
    """Accuracy on an even selection of at most `limit` images, and how many were read.

    None when the images carry no labels.
    """
    chosen = take(images, limit)
    correct = total = 0
    device = next(model.parameters()).device
    for batch in read_batches(chosen, preprocess, size=64):
        if batch.targets is None:
            return None, 0
        with torch.no_grad():
            predicted = model(torch.from_numpy(batch.images).to(device)).argmax(1).cpu()
        correct += int((predicted == torch.from_numpy(batch.targets)).sum())
        total += len(batch.targets)
    return correct / total, total
