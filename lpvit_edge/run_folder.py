"""One folder holds one run of the main job: what it was made for, and what it may contain."""

from pathlib import Path
from typing import ClassVar

import msgspec

from lpvit_edge import files
from lpvit_edge.errors import MismatchError
from lpvit_edge.images import Preprocess, content_sha256
from lpvit_edge.job import Job
from lpvit_edge.records import ModelIdentity, Record

# In the order in which they are written; each depends on those before it.
ARTEFACTS = (
    "run.json",
    "dense.onnx",
    "device_profile.partial.json",
    "device_profile.json",
    "sensitivity.json",
    "allocation.json",
    "model.safetensors",
    "prune.json",
    "model.onnx",
    "export.json",
    "manifest.json",
    "check.json",
    "curve.json",
    "optimize.json",
    "report.html",
)


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What to reach and how."""

    target_latency: str
    allocator: str = "milp"
    criterion: str = "hessian"
    curve: bool = True
    profile_seconds: float | None = None  # bound of the layer forms; None: 0.3 s for each
    network_seconds: float = 4.0  # of each whole network that is timed on the way
    check_seconds: float = 10.0  # of each engine in the closing comparison


class Run(Record, frozen=True, kw_only=True):
    """What a run folder was made for: `--resume` goes on only with the same."""

    KIND: ClassVar[str] = "run"

    model: ModelIdentity
    calibration_sha256: str
    heldout_sha256: str
    labels: tuple[str, ...] | None
    preprocess: Preprocess
    target_latency: str
    allocator: str
    criterion: str
    engine: str
    threads: int
    patterns: tuple[str, ...]


def start(job: Job, goal: Goal, *, resume: bool, overwrite: bool) -> None:
    """Make the run folder ready. Raises MismatchError when it holds another run."""
    run = Run(
        model=job.model.identity,
        calibration_sha256=content_sha256(job.calibration),
        heldout_sha256=content_sha256(job.heldout),
        labels=job.model.labels,
        preprocess=job.model.preprocess,
        target_latency=goal.target_latency,
        allocator=goal.allocator,
        criterion=goal.criterion,
        engine=job.engine,
        threads=job.threads,
        patterns=job.patterns,
    )
    found = [name for name in ARTEFACTS if job.path(name).exists()]
    if job.path("run.json").exists() and resume:
        _refuse_other_run(files.load(Run, job.path("run.json")), run, job.folder)
    elif found and not (overwrite or resume):
        raise MismatchError(
            f"{job.folder} already holds a run ({', '.join(found[:3])} ...); pass --resume to go "
            "on with it, --overwrite to start again, or another --out"
        )
    elif found and overwrite:
        for name in found:
            job.path(name).unlink()
    files.save(run, job.path("run.json"))


def _refuse_other_run(found: Run, expected: Run, folder: Path) -> None:
    different = [
        f"{field} was {getattr(found, field)!r}, now {getattr(expected, field)!r}"
        for field in Run.__struct_fields__
        if getattr(found, field) != getattr(expected, field)
    ]
    if different:
        raise MismatchError(
            f"{folder} is of another run: {'; '.join(different)}. Pass --overwrite to start again"
        )
