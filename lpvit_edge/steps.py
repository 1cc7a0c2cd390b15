"""The steps of the main job, each from files to files in one run folder.

    sensitivity  sensitivity.json, rotated.safetensors where the model is rotated
    allocate     allocation.json
    prune        model.safetensors, prune.json: lpvit_edge.prune_step
    export       model.onnx, export.json
    build        manifest.json, bundle.json, golden.zip
    check        check.json, reference.json, reference.safetensors

Each function loads what it needs, calls the library, and saves what the next one reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge import basis, files, weights
from lpvit_edge.errors import MismatchError
from lpvit_edge.images import content_sha256, read_all
from lpvit_edge.job import Job
from lpvit_edge.pattern import Pattern, parse_pattern
from lpvit_edge.progress import say, track, working
from lpvit_edge.records import (
    Allocation,
    Check,
    ExportLog,
    Manifest,
    ModelIdentity,
    PruneLog,
    Sensitivity,
    SensitivityCurve,
)
from lpvit_edge.torch_device import placed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lpvit_edge.prune import Form

TOLERANCE = 1e-3  # of the largest logit, between torch and an engine


def export_model(
    job: Job,
    model: "nn.Module",
    patterns: Mapping[str, Pattern],
    path: Path,
    *,
    shrunk: bool = False,
) -> tuple[str, ...]:
    """Write a model of the job's architecture, its layers in `patterns` as sparse nodes.

    With `shrunk`, what no longer computes anything is left out; what went is returned.
    """
    from lpvit_edge.export import export_onnx

    size = job.model.preprocess.image_size
    return export_onnx(model, job.walk, patterns, path, image_size=size, shrunk=shrunk)


def read_calibration(
    job: Job, *, device: str = "cpu"
) -> "tuple[torch.Tensor, torch.Tensor | None, tuple[str, ...]]":
    """Calibration images (n, 3, S, S), their classes (n,), and the files that cannot be read."""
    import torch

    batch = read_all(job.calibration, job.model.preprocess)
    targets = None if batch.targets is None else torch.from_numpy(batch.targets).to(device)
    return torch.from_numpy(batch.images).to(device), targets, batch.skipped


def sensitivity(job: Job, *, rotate: bool | None = None) -> Sensitivity:
    """Distortion curves of every layer in every pattern, by both criteria.

    They are of the model in the basis that lpvit_edge.basis chooses; `rotate` asks for one.
    """
    from torch import nn

    from lpvit_edge import sensitivity as curves

    images, targets, skipped = read_calibration(job, device=job.device)
    if skipped:
        say(f"{len(skipped)} calibration images were left out: {'; '.join(skipped[:5])}")
    patterns = tuple(parse_pattern(name) for name in job.patterns)
    job = basis.choose(placed(job), images, rotate=rotate)
    moments = curves.gather_moments(job.model.module, job.walk, images, targets, patterns=patterns)
    found: list[SensitivityCurve] = []
    layers = job.walk.layers
    for layer in track(layers, what="sensitivity: curves", total=len(layers)):
        module = job.model.module.get_submodule(layer.name)
        assert isinstance(module, nn.Linear)
        found += curves.layer_curves(layer, module, moments[layer.name], images=len(images))
    record = Sensitivity(
        model=job.model.identity,
        images=len(images),
        images_sha256=content_sha256(job.calibration),
        curves=tuple(found),
        basis_sha256=job.basis_sha256,
    )
    files.save(record, job.path("sensitivity.json"))
    return record


def forms(allocation: Allocation) -> "dict[str, Form]":
    """The form of each layer that is not left dense."""
    from lpvit_edge.prune import Form

    return {
        choice.layer: Form(pattern=parse_pattern(choice.pattern), sparsity=choice.sparsity)
        for choice in allocation.choices
        if choice.pattern != "dense"
    }


def refuse_other_model(found: ModelIdentity, expected: ModelIdentity, *, what: str) -> None:
    """Raise MismatchError, naming the difference, when a file is of another model."""
    different = [
        f"{field} is {getattr(found, field)!r} there and {getattr(expected, field)!r} here"
        for field in ModelIdentity.__struct_fields__
        if getattr(found, field) != getattr(expected, field)
    ]
    if different:
        raise MismatchError(f"{what} is of another model: {'; '.join(different)}. Make it again")


def export(
    job: Job, allocation: Allocation, *, precision: str = "default", python_free: bool = False
) -> ExportLog:
    """Write model.onnx and hold it against the pruned torch model in two runtimes.

    The engine is compared in its default precision; TensorRT's, which is built once, in `precision`
    already, for whose int8 both networks are calibrated here.
    """
    from lpvit_edge.export import compare_runtimes
    from lpvit_edge.int8 import calibrate
    from lpvit_engines import resolve_precision

    weights_sha256 = _weights_of(job)
    pruned = weights.filled(job.model.module, pruned_weights(job))
    patterns = {name: form.pattern for name, form in forms(allocation).items()}
    path = job.path("model.onnx")
    with working("export: model.onnx"):
        gone = export_model(job, pruned, patterns, path, shrunk=True)
    images, _, _ = read_calibration(job)
    chosen = resolve_precision(job.engine, precision)
    if (job.engine, chosen) == ("tensorrt", "int8"):
        for file in (path, job.path("dense.onnx")):
            calibrate(file, images.numpy())
    with working("export: against torch"):
        compared, dense = (
            compare_runtimes(
                model,
                file,
                images[:8],
                engine=job.engine,
                threads=job.threads,
                tolerance=TOLERANCE,
                precision=chosen if job.engine == "tensorrt" else "default",
                python_free=python_free,
            )
            for model, file in ((pruned, path), (job.model.module, job.path("dense.onnx")))
        )
    for sentence in gone:
        say(sentence)
    record = ExportLog(
        model_sha256=weights_sha256,
        onnx_sha256=files.sha256_of(path),
        images=min(8, len(images)),
        tolerance=TOLERANCE,
        onnxruntime_error=compared.onnxruntime_error,
        engine_error=compared.engine_error,
        engine_tolerance=compared.engine_tolerance,
        dense_engine_error=dense.engine_error,
        dense_engine_tolerance=dense.engine_tolerance,
    )
    files.save(record, job.path("export.json"))
    return record


def _weights_of(job: Job) -> str:
    """Hash of model.safetensors; MismatchError unless it was pruned as the files beside it say."""
    from lpvit_edge.recipe import current

    log = files.load(PruneLog, job.path("prune.json"))
    refuse_other_model(log.model, job.model.identity, what="model.safetensors")
    if log.allocation_sha256 != files.sha256_of(job.path("allocation.json")):
        raise MismatchError(
            "model.safetensors was pruned under another allocation.json; run `lpvit prune` again"
        )
    sha256 = files.sha256_of(job.path("model.safetensors"))
    if sha256 != log.model_sha256 and current(job.folder, sha256) is None:
        raise MismatchError(
            "model.safetensors is neither what prune.json nor what finetune.json is about; run "
            "`lpvit prune` again"
        )
    return sha256


def pruned_weights(job: Job) -> "dict[str, torch.Tensor]":
    """The tensors of model.safetensors."""
    return weights.load(job.path("model.safetensors"))


def build(job: Job, *, precision: str = "default", python_free: bool = False) -> Manifest:
    """Compile model.onnx on this device, note what really runs, and seal the bundle to deploy."""
    from lpvit_edge.bundle import write_bundle
    from lpvit_edge.golden import golden_frames
    from lpvit_edge.profile import engine_version
    from lpvit_engines import load_engine, resolve_precision
    from lpvit_profilers.device import fingerprint, identify

    path = job.path("model.onnx")
    chosen, profiled = (resolve_precision(job.engine, x) for x in (precision, "default"))
    if chosen != profiled:
        say(f"predicted times are {profiled}'s; what {chosen} takes, `lpvit check` measures")
    if job.engine == "tensorrt":
        from lpvit_edge.tensorrt_build import build_proven

        build_proven(path, precision=chosen, python_free=python_free)
    with load_engine(job.engine, path, threads=job.threads, precision=precision) as engine:
        kernels = engine.kernels()
        golden = golden_frames(job.calibration.paths, engine, job.model.preprocess)
    record = Manifest(
        engine=job.engine,
        engine_version=engine_version(job.engine),
        onnx_sha256=files.sha256_of(path),
        fingerprint=fingerprint(identify()),
        threads=job.threads,
        precision=chosen,
        labels=job.model.labels or (),
        kernels=kernels,
    )
    files.save(record, job.path("manifest.json"))
    write_bundle(
        job.folder, model=job.model.identity, preprocess=job.model.preprocess, golden=golden
    )
    return record


def check(job: Job, allocation: Allocation, *, seconds: float = 10.0) -> Check:
    """Dense and sparse engine side by side on the held-out images, as manifest.json says."""
    from lpvit_edge.check import check_engines
    from lpvit_edge.dense_bundle import DENSE_REFERENCE
    from lpvit_edge.drift.build import write_reference

    refuse_other_model(allocation.model, job.model.identity, what="the allocation")
    exported = files.load(ExportLog, job.path("export.json"))
    if exported.onnx_sha256 != files.sha256_of(job.path("model.onnx")):
        raise MismatchError("model.onnx is not the one export.json is about; run `lpvit build`")
    precision = files.load(Manifest, job.path("manifest.json")).precision
    record = check_engines(
        job.path("dense.onnx"),
        job.path("model.onnx"),
        job.heldout,
        job.model.preprocess,
        engine=job.engine,
        threads=job.threads,
        precision=precision,
        predicted_latency_ms=allocation.predicted_latency_ms,
        seconds=seconds,
    )
    files.save(record, job.path("check.json"))
    # The dense network may take the line over, and is to be watched then too.
    for onnx, name in (("model.onnx", "reference"), ("dense.onnx", DENSE_REFERENCE)):
        write_reference(
            job.path(onnx),
            calibration=job.calibration,
            heldout=job.heldout,
            preprocess=job.model.preprocess,
            engine=job.engine,
            threads=job.threads,
            precision=precision,
            name=name,
        )
    return record
