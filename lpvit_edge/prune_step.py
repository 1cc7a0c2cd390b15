"""From an allocation to pruned weights: model.safetensors, prune.json, matching.json if asked."""

from typing import TYPE_CHECKING

from lpvit_edge import basis, files, steps, weights
from lpvit_edge.images import content_sha256
from lpvit_edge.job import Job
from lpvit_edge.matching import Matching, MatchLog
from lpvit_edge.progress import say, track
from lpvit_edge.records import Allocation, PrunedLayer, PruneLog
from lpvit_edge.run_folder import PRUNE_FOLDER
from lpvit_edge.torch_device import placed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lpvit_edge.prune import Settings


def prune(
    job: Job,
    allocation: Allocation,
    *,
    settings: "Settings | None" = None,
    weigh_outputs: bool = False,
    matching: Matching | None = None,
) -> PruneLog:
    """Prune and repair every layer as allocated; the weights go to model.safetensors.

    The model is pruned in the basis that the allocation is of. Finished layers lie in prune.partial
    until the last one is done, so that an interrupted run goes on behind them. With `weigh_outputs`
    an output of a layer counts by its mean squared loss gradient when blocks are chosen. With
    `matching`, outputs are matched at the end: matching.json.
    """
    from lpvit_edge import partial
    from lpvit_edge.prune import Settings

    steps.refuse_other_model(allocation.model, job.model.identity, what="the allocation")
    job = placed(basis.of(job, allocation.basis_sha256))
    settings = settings or Settings()
    images, targets, skipped = steps.read_calibration(job, device=job.device)
    chosen_sha256 = files.sha256_of(job.path("allocation.json"))
    images_sha256 = content_sha256(job.calibration)
    digest = partial.made_from(
        job.model.identity,
        allocation_sha256=chosen_sha256,
        images_sha256=images_sha256,
        settings=settings,
        weighed=weigh_outputs,
    )
    row_weights = _output_fisher(job, images, targets) if weigh_outputs else None
    model, layers = _pruned(job, allocation, images, settings, row_weights, digest=digest)
    job.path("matching.json").unlink(missing_ok=True)
    if matching is None:
        weights.save(model, job.path("model.safetensors"))
    else:
        _match(job, model, images, matching)
    record = PruneLog(
        model=job.model.identity,
        allocation_sha256=chosen_sha256,
        images=len(images),
        images_sha256=images_sha256,
        skipped=skipped,
        method=_method(job, settings, weighed=weigh_outputs, matched=matching is not None),
        layers=layers,
        model_sha256=files.sha256_of(job.path("model.safetensors")),
    )
    files.save(record, job.path("prune.json"))
    partial.clear(job.path(PRUNE_FOLDER))
    return record


def _method(job: Job, settings: "Settings", *, weighed: bool, matched: bool) -> str:
    done = {
        "rotated": job.basis_sha256 is not None,
        "reordered": settings.permute,
        "outputs weighed": weighed,
        "outputs matched": matched,
    }
    repair = f"repair {'on' if settings.repair else 'off'}"
    return ", ".join([settings.selection, repair, *(name for name, so in done.items() if so)])


def _pruned(
    job: Job,
    allocation: Allocation,
    images: "torch.Tensor",
    settings: "Settings",
    row_weights: "dict[str, torch.Tensor] | None",
    *,
    digest: str,
) -> "tuple[nn.Module, tuple[PrunedLayer, ...]]":
    """The model after its last layer and what was done to each, on disk as they are finished."""
    from lpvit_edge import partial
    from lpvit_edge.prune import prune

    finished = job.path(PRUNE_FOLDER)
    done = partial.kept(finished, digest=digest)
    if done:
        say(f"{len(done)} layers of an interrupted run are taken from {finished}")
    layers = prune(
        job.model.module,
        job.walk,
        steps.forms(allocation),
        images,
        settings=settings,
        row_weights=row_weights,
        done=done,
    )
    model, log = job.model.module, list[PrunedLayer]()
    kept = partial.keeping(layers, finished, digest=digest)
    for layer, so_far in track(kept, what="prune: layers", total=len(job.walk.layers)):
        log.append(layer)
        model = so_far
    return model, tuple(log)


def _output_fisher(
    job: Job, images: "torch.Tensor", targets: "torch.Tensor | None"
) -> "dict[str, torch.Tensor]":
    from lpvit_edge.sensitivity import gather_moments, output_fisher

    return output_fisher(gather_moments(job.model.module, job.walk, images, targets, patterns=()))


def _match(job: Job, pruned: "nn.Module", images: "torch.Tensor", matching: Matching) -> None:
    """Match the outputs of pruned weights; writes model.safetensors and matching.json."""
    from lpvit_edge.match_outputs import match_outputs

    found = match_outputs(job.model.module, pruned, job.walk, images, settings=matching)
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
