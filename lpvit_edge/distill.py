"""Train the remaining weights of a pruned model to answer as the dense one does.

The second stage of LPViT (arXiv 2407.02068, after DeiT, arXiv 2012.12877): soft distillation, the
divergence from the dense model's probabilities, and hard distillation, the cross entropy with its
answer, beside the labels where there are any. Weights that pruning removed get no gradient, so that
no optimizer moves them; after each epoch this is asserted.
"""

import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lpvit_edge.errors import DataError, MismatchError, PruningError
from lpvit_edge.files import replace_atomic
from lpvit_edge.images import ImageFolder, Preprocess, read_image
from lpvit_edge.progress import track
from lpvit_edge.recipe import FinetuneEpoch, Recipe

NO_LABEL = -100  # what torch's cross entropy ignores


def loss_parts(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float
) -> dict[str, Tensor]:
    """Mean soft, hard and label losses of logits (n, classes); labels (n,) may be NO_LABEL.

    soft is T^2 KL(p_teacher^(1/T) || p_student^(1/T)), Hinton et al. 2015, equation 1; the factor
    keeps its gradients as large as those of the others.
    """
    T = temperature
    log_p, log_q = (functional.log_softmax(logits / T, 1) for logits in (student, teacher))
    soft = T * T * functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    known = labels != NO_LABEL
    by_labels = functional.cross_entropy(student[known], labels[known]) if known.any() else 0 * soft
    return {
        "soft": soft,
        "hard": functional.cross_entropy(student, teacher.argmax(1)),
        "labels": by_labels,
    }


def total_loss(parts: Mapping[str, Tensor], recipe: Recipe) -> Tensor:
    """The weighted sum of the three parts."""
    weights = {"soft": recipe.soft, "hard": recipe.hard, "labels": recipe.labels}
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum()


def masks_of(model: nn.Module, layers: tuple[str, ...]) -> dict[str, Tensor]:
    """For each named layer where its weight is not zero, (N, K) bool. Raises PruningError."""
    masks = {name: model.get_parameter(f"{name}.weight").detach() != 0 for name in layers}
    full = [name for name, mask in masks.items() if bool(mask.all())]
    if full:
        raise PruningError(
            f"{', '.join(full[:5])}: allocated to be sparse, but no weight is zero; these are not "
            "pruned weights. Run `lpvit prune` first"
        )
    return masks


def hold_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Let no gradient reach a removed weight."""
    for name, mask in masks.items():
        parameter = model.get_parameter(f"{name}.weight")
        kept = mask.to(parameter.device)
        parameter.register_hook(partial(torch.mul, kept))  # type: ignore[no-untyped-call]


def refuse_violated(model: nn.Module, masks: Mapping[str, Tensor], *, epoch: int) -> None:
    """Raise PruningError, naming the layers, when a removed weight is no longer zero."""
    counts = {
        name: int((model.get_parameter(f"{name}.weight").detach().cpu()[~mask.cpu()] != 0).sum())
        for name, mask in masks.items()
    }
    violated = [f"{name} ({count})" for name, count in counts.items() if count]
    if violated:
        raise PruningError(
            f"after epoch {epoch} weights that pruning removed are not zero: "
            f"{', '.join(violated[:5])}. model.safetensors was left as it was; report this with "
            "the recipe"
        )


class Images(Dataset[tuple[Tensor, int]]):
    """Images (3, S, S) with their classes, in the order of the current epoch."""

    def __init__(self, images: ImageFolder, preprocess: Preprocess) -> None:
        self.images, self.preprocess = images, preprocess
        self.order: list[int] = list(range(len(images.paths)))

    def shuffle(self, *, seed: int) -> None:
        """The order of one epoch, the same in every process."""
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(self.images.paths), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        place = self.order[index]
        pixels = torch.from_numpy(read_image(self.images.paths[place], self.preprocess))
        targets = self.images.targets
        return pixels, NO_LABEL if targets is None else targets[place]


class Training:
    """A student on its way, through accelerate: one CPU, one GPU or many processes alike.

    `batch` of the recipe is that of all processes together. Raises DataError for fewer images
    than one batch, or a batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        masks: Mapping[str, Tensor],
        images: ImageFolder,
        preprocess: Preprocess,
        recipe: Recipe,
    ) -> None:
        from lpvit_edge.deps import require

        accelerate = require("accelerate")
        self.accelerator: Any = accelerate.Accelerator(
            cpu=not torch.cuda.is_available(),
            dataloader_config=accelerate.DataLoaderConfiguration(split_batches=True),
        )
        processes = self.accelerator.num_processes
        if recipe.batch % processes or len(images.paths) < recipe.batch:
            raise DataError(
                f"{len(images.paths)} training images in batches of {recipe.batch} over "
                f"{processes} processes: give at least one whole batch, and a --batch that the "
                "processes divide"
            )
        self.recipe, self.masks, self.data = recipe, masks, Images(images, preprocess)
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        loader: DataLoader[tuple[Tensor, int]] = DataLoader(
            self.data, batch_size=recipe.batch, drop_last=True
        )
        self.student, self.optimizer, self.loader = self.accelerator.prepare(
            student, optimizer, loader
        )
        self.teacher = teacher.to(self.accelerator.device).eval()
        self.history: list[FinetuneEpoch] = []
        hold_masks(self.plain_student, masks)

    @property
    def plain_student(self) -> nn.Module:
        """The student without what accelerate wrapped around it."""
        module: nn.Module = self.accelerator.unwrap_model(self.student)
        return module

    def run(self, state: Path) -> Iterator[FinetuneEpoch]:
        """Train the epochs that are missing; after each, `state` has all that goes on from it."""
        for epoch in range(len(self.history) + 1, self.recipe.epochs + 1):
            done = self._epoch(epoch)
            refuse_violated(self.plain_student, self.masks, epoch=epoch)
            self.history.append(done)
            replace_atomic(state, lambda temporary: torch.save(self._state(), temporary))
            yield done

    def _epoch(self, epoch: int) -> FinetuneEpoch:
        started = time.perf_counter()
        torch.manual_seed(self.recipe.seed + epoch)  # dropout, where a model has any
        self.data.shuffle(seed=self.recipe.seed + epoch)
        self.student.train()
        steps = len(self.loader)
        sums = torch.zeros(3, device=self.accelerator.device)
        shown = track(self.loader, what=f"finetune: epoch {epoch}", total=steps)
        for step, (pixels, labels) in enumerate(shown):
            self._set_learning_rate((epoch - 1) * steps + step, steps)
            sums += self._step(pixels, labels)
        means = (self.accelerator.reduce(sums, "mean") / steps).tolist()
        self.student.eval()
        rate = float(self.optimizer.param_groups[0]["lr"])
        return FinetuneEpoch(
            epoch=epoch,
            soft=means[0],
            hard=means[1],
            labels=means[2],
            learning_rate=rate,
            seconds=time.perf_counter() - started,
        )

    def _step(self, pixels: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(pixels)
        parts = loss_parts(
            self.student(pixels), teacher, labels, temperature=self.recipe.temperature
        )
        self.optimizer.zero_grad()
        self.accelerator.backward(total_loss(parts, self.recipe))
        self.optimizer.step()
        return torch.stack([part.detach() for part in parts.values()])

    def _set_learning_rate(self, step: int, steps_per_epoch: int) -> None:
        """Linear over the first tenth, then a half cosine to zero: a function of the step alone."""
        total = self.recipe.epochs * steps_per_epoch
        warmup = max(1, total // 10)
        share = (step - warmup) / max(1, total - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * factor

    def _state(self) -> dict[str, Any]:
        import msgspec

        return {
            "recipe": msgspec.to_builtins(self.recipe),
            "history": msgspec.to_builtins(tuple(self.history)),
            "student": self.plain_student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def resume(self, state: Path) -> None:
        """Go on from what `run` left. Raises MismatchError when it is of another recipe."""
        import msgspec

        found = torch.load(state, map_location=self.accelerator.device, weights_only=True)
        wanted = msgspec.to_builtins(self.recipe)
        different = [
            f"{name} was {found['recipe'].get(name)!r}, now {value!r}"
            for name, value in wanted.items()
            if found["recipe"].get(name) != value
        ]
        if different:
            raise MismatchError(
                f"{state}: another recipe: {'; '.join(different)}. Give the same options, or "
                "start again with --overwrite"
            )
        self.plain_student.load_state_dict(found["student"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.history = [msgspec.convert(item, FinetuneEpoch) for item in found["history"]]
