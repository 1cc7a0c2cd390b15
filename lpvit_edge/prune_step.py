"""From an allocation to pruned weights: model.safetensors, prune.json, matching.json if asked."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge import files, steps, weights
from lpvit_edge.images import content_sha256
from lpvit_edge.job import Job
from lpvit_edge.matching import Matching, MatchLog
from lpvit_edge.progress import say, track, working
from lpvit_edge.records import Allocation, PrunedLayer, PruneLog
from lpvit_edge.run_folder import PRUNE_FOLDER

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lpvit_edge.prune import Form, Settings


def prune(
    job: Job,
    allocation: Allocation,
    *,
    settings: "Settings | None" = None,
    weigh_outputs: bool = False,
    rotate: bool = False,
    matching: Matching | None = None,
) -> PruneLog:
    """Prune and repair every layer as allocated; the weights go to model.safetensors.

    Finished layers lie in prune.partial until the last one is done, so that an interrupted run
    goes on behind them. With `weigh_outputs` an output of a layer counts by its mean squared loss
    gradient when blocks are chosen. With `rotate` the residual stream is rotated first, see
    lpvit_edge.rotate. With `matching`, outputs are matched at the end: matching.json.
    """
    from lpvit_edge import partial
    from lpvit_edge.prune import Settings, prune

    steps.refuse_other_model(allocation.model, job.model.identity, what="the allocation")
    settings = settings or Settings()
    images, targets, skipped = steps.read_calibration(job)
    chosen_sha256 = files.sha256_of(job.path("allocation.json"))
    images_sha256 = content_sha256(job.calibration)
    digest = partial.made_from(
        job.model.identity,
        allocation_sha256=chosen_sha256,
        images_sha256=images_sha256,
        settings=settings,
        weighed=weigh_outputs,
        rotated=rotate,
    )
    finished = job.path(PRUNE_FOLDER)
    done = partial.kept(finished, digest=digest)
    if done:
        say(f"{len(done)} layers of an interrupted run are taken from {finished}")
    dense = job.model.module
    if rotate:
        dense = _rotated(job, steps.forms(allocation), images, settings, finished, digest)
    layers = prune(
        dense,
        job.walk,
        steps.forms(allocation),
        images,
        settings=settings,
        row_weights=_output_fisher(dense, job, images, targets) if weigh_outputs else None,
        done=done,
    )
    model, log = _each(partial.keeping(layers, finished, digest=digest), job, dense)
    job.path("matching.json").unlink(missing_ok=True)
    path = job.path("model.safetensors")
    if matching is None:
        weights.save(model, path)
    else:
        _match(job, dense, model, images, matching)
    record = PruneLog(
        model=job.model.identity,
        allocation_sha256=chosen_sha256,
        images=len(images),
        images_sha256=images_sha256,
        skipped=skipped,
        method=_method(settings, weighed=weigh_outputs, rotated=rotate, matched=bool(matching)),
        layers=log,
        model_sha256=files.sha256_of(path),
    )
    files.save(record, job.path("prune.json"))
    partial.clear(finished)
    return record


def _method(settings: "Settings", *, weighed: bool, rotated: bool, matched: bool) -> str:
    asked = {
        "reordered": settings.permute,
        "outputs weighed": weighed,
        "rotated": rotated,
        "outputs matched": matched,
    }
    repair = f"repair {'on' if settings.repair else 'off'}"
    return ", ".join([settings.selection, repair, *(name for name, on in asked.items() if on)])


def _each(
    layers: "Iterable[tuple[PrunedLayer, nn.Module]]", job: Job, dense: "nn.Module"
) -> "tuple[nn.Module, tuple[PrunedLayer, ...]]":
    """The model after the last layer, and what was done to each."""
    model, log = dense, list[PrunedLayer]()
    for layer, so_far in track(layers, what="prune: layers", total=len(job.walk.layers)):
        log.append(layer)
        model = so_far
    return model, tuple(log)


def _rotated(
    job: Job,
    forms: "Mapping[str, Form]",
    images: "torch.Tensor",
    settings: "Settings",
    folder: Path,
    digest: str,
) -> "nn.Module":
    """The dense model with its residual stream rotated: an interrupted run's, where there is one.

    A direction that carries nothing may come out differently in another run.
    """
    from lpvit_edge import partial
    from lpvit_edge.distributed import refuse_idle, share
    from lpvit_edge.rotate import rotated

    known = partial.kept_basis(folder, digest=digest)
    if known is not None:
        return weights.filled(job.model.module, known)
    starts = range(0, len(images), settings.batch)
    batches = [images[start : start + settings.batch] for start in starts]
    refuse_idle(len(batches))
    with working("prune: rotate the residual stream"):
        model = rotated(job.model.module, job.walk, [*share(batches)], forms)
    partial.keep_basis(folder, model, digest=digest)
    return model


def _output_fisher(
    model: "nn.Module", job: Job, images: "torch.Tensor", targets: "torch.Tensor | None"
) -> "dict[str, torch.Tensor]":
    from lpvit_edge.sensitivity import gather_moments, output_fisher

    return output_fisher(gather_moments(model, job.walk, images, targets, patterns=()))


def _match(
    job: Job,
    dense: "nn.Module",
    pruned: "nn.Module",
    images: "torch.Tensor",
    matching: Matching,
) -> None:
    """Match the outputs of pruned weights; writes model.safetensors and matching.json."""
    from lpvit_edge.match_outputs import match_outputs

    found = match_outputs(dense, pruned, job.walk, images, settings=matching)
    path = job.path("model.safetensors")
    weights.save(found.model, path)
    record = MatchLog(
        model=job.model.identity,
        steps=matching.steps,
        kept_step=found.kept_step,
        parameters=found.parameters,
        images=found.images,
        images_apart=found.images_apart,
        loss_before=found.loss_before,
        loss_after=found.loss_after,
        seconds=found.seconds,
        model_sha256=files.sha256_of(path),
    )
    files.save(record, job.path("matching.json"))
