"""From a run folder with pruned weights to fine-tuned ones: model.safetensors, finetune.json."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge import distributed, files, steps, weights
from lpvit_edge.errors import DataError, MismatchError
from lpvit_edge.images import ImageFolder, content_sha256, overlap, read_image
from lpvit_edge.job import Job
from lpvit_edge.progress import say, track
from lpvit_edge.recipe import FinetuneLog, Recipe
from lpvit_edge.records import Allocation, PruneLog

if TYPE_CHECKING:
    from torch import nn

    from lpvit_edge.distill import Training

STATE = "finetune.state.pt"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `lpvit finetune`; see lpvit_edge.recipe for their meaning."""

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    soft: float = 1.0
    hard: float = 0.5
    labels: float = 0.5
    temperature: float = 2.0
    seed: int = 0


def finetune(
    job: Job,
    allocation: Allocation,
    images: ImageFolder,
    plan: Plan,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> FinetuneLog:
    """Distil the dense model into the pruned one, its zeros held. An interrupted run resumes.

    Raises MismatchError when model.safetensors is not the pruned one, DataError when training
    images are also held out, PruningError when a removed weight comes back.
    """
    from lpvit_edge.distill import Training, masks_of

    _refuse_held_out(images, job)
    state = job.path(STATE)
    # The last thing that a run does is to replace the weights and to remove its state.
    pruned = _pruned_log(job, may_be_tuned=resume and state.exists())
    _refuse_left_over(state, expected=resume or overwrite)
    readable, skipped = _readable(images, job)
    student = weights.filled(job.model.module, steps.pruned_weights(job))
    masks = masks_of(student, tuple(steps.forms(allocation)))
    before = _accuracy(job, student, "finetune: accuracy before")
    recipe = Recipe(
        **msgspec.structs.asdict(plan),
        images_sha256=content_sha256(readable),
        start_sha256=pruned.model_sha256,
    )
    training = Training(
        student, copy.deepcopy(job.model.module), masks, readable, job.model.preprocess, recipe
    )
    if resume and state.exists():
        training.resume(state)
    trained = _trained(training, state)
    after = _accuracy(job, trained, "finetune: accuracy after")
    weights.save(trained, job.path("model.safetensors"))
    record = FinetuneLog(
        model=job.model.identity,
        recipe=recipe,
        images=len(readable.paths),
        skipped=skipped,
        processes=training.accelerator.num_processes,
        device=str(training.accelerator.device),
        history=tuple(training.history),
        masked_weights=sum(int((~mask).sum()) for mask in masks.values()),
        accuracy_before=before,
        accuracy_after=after,
        heldout_images=len(job.heldout.paths),
        model_sha256=files.sha256_of(job.path("model.safetensors")),
    )
    files.save(record, job.path("finetune.json"))
    if distributed.is_main():
        state.unlink()
    return record


def _refuse_held_out(images: ImageFolder, job: Job) -> None:
    shared = overlap(images, job.heldout)
    if shared:
        raise DataError(
            f"{len(shared)} training images are also held out ({shared[0]} ...): accuracy would be "
            "measured on images that training has seen; give disjoint folders"
        )


def _refuse_left_over(state: Path, *, expected: bool) -> None:
    if state.exists() and not expected:
        raise MismatchError(
            f"{state} is left from an interrupted run; pass --resume to go on with it, --overwrite "
            "to start again"
        )


def _trained(training: "Training", state: Path) -> "nn.Module":
    """Run all epochs, saying how each went; the student on the processor afterwards."""
    for done in training.run(state):
        say(
            f"finetune: epoch {done.epoch} of {training.recipe.epochs}: soft {done.soft:.4f}, hard "
            f"{done.hard:.4f}, labels {done.labels:.4f}"
        )
    return training.plain_student.to("cpu").eval()


def _pruned_log(job: Job, *, may_be_tuned: bool) -> PruneLog:
    """The log of the pruned weights that lie in the folder."""
    log = files.load(PruneLog, job.path("prune.json"))
    steps.refuse_other_model(log.model, job.model.identity, what="prune.json")
    is_pruned = files.sha256_of(job.path("model.safetensors")) == log.model_sha256
    if not (is_pruned or may_be_tuned):
        raise MismatchError(
            "model.safetensors is not what `lpvit prune` left, perhaps because it was fine-tuned "
            "already; run `lpvit prune` again and then `lpvit finetune`, with more --epochs"
        )
    return log


def _readable(images: ImageFolder, job: Job) -> tuple[ImageFolder, tuple[str, ...]]:
    """The images that can be read, and why the others cannot."""
    good: list[int] = []
    skipped: list[str] = []
    for index, path in enumerate(
        track(images.paths, what="finetune: read", total=len(images.paths))
    ):
        try:
            read_image(path, job.model.preprocess)
        except DataError as error:
            skipped.append(str(error))
        else:
            good.append(index)
    if not good:
        raise DataError(f"{images.folder}: none of {len(images.paths)} files is a readable image")
    if skipped:
        say(f"{len(skipped)} training images were left out: {'; '.join(skipped[:5])}")
    targets = images.targets
    kept = msgspec.structs.replace(
        images,
        paths=tuple(images.paths[index] for index in good),
        targets=None if targets is None else tuple(targets[index] for index in good),
    )
    return kept, tuple(skipped)


def _accuracy(job: Job, model: "nn.Module", what: str) -> float | None:
    from lpvit_edge.evaluate import answers, paired

    if job.heldout.targets is None:
        return None
    found = answers(model.eval(), job.heldout, job.model.preprocess, what=what)
    counts = paired(found, found, job.heldout)
    return counts.correct / counts.images
