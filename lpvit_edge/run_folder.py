"""One folder holds one run of the main job: what it was made for, and what it may contain."""

import shutil
from pathlib import Path
from typing import ClassVar

import msgspec

from lpvit_edge import files
from lpvit_edge.budget import named
from lpvit_edge.errors import MismatchError
from lpvit_edge.floor import Floor, floor_of
from lpvit_edge.images import Preprocess, content_sha256
from lpvit_edge.job import Job
from lpvit_edge.records import ModelIdentity, Record

# In the order in which they are written; each depends on those before it.
ARTEFACTS = (
    "run.json",
    "dense.onnx",
    "device_profile.partial.json",
    "device_profile.json",
    "rotated.safetensors",
    "sensitivity.json",
    "floor.json",
    "allocation.json",
    "model.safetensors",
    "matching.json",
    "prune.json",
    "finetune.state.pt",
    "finetune.json",
    "model.onnx",
    "export.json",
    "manifest.json",
    "bundle.json",
    "golden.zip",
    "check.json",
    "reference.safetensors",
    "reference.json",
    "dense_reference.safetensors",
    "dense_reference.json",
    "curve.json",
    "optimize.json",
    "report.html",
)

PRUNE_FOLDER = "prune.partial"  # of the layers pruned so far, see lpvit_edge.partial
STEPS_FOLDER = "floor"  # of the search for the accuracy floor, while it runs


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What to reach and how: targets, an accuracy floor, or both."""

    target_latency: str | None = None
    target_energy: str | None = None
    max_power: str | None = None
    target_macs: str | None = None
    target_weights: str | None = None
    allow_estimated_energy: bool = False
    accuracy_floor: float | None = None  # a fraction
    max_drop: float | None = None  # points, from the dense model
    allocator: str = "milp"
    criterion: str = "hessian"
    rotate: bool | None = None  # None: where the model allows it and the patterns gain by it
    curve: bool = True
    profile_seconds: float | None = None  # bound of the layer forms; None: 0.3 s for each
    network_seconds: float = 4.0  # of each whole network that is timed on the way
    check_seconds: float = 10.0  # of each engine in the closing comparison

    def targets(self) -> dict[str, str]:
        """The targets that were given, by the keys of lpvit_edge.budget.QUANTITIES."""
        return named(
            latency_ms=self.target_latency,
            energy_mj=self.target_energy,
            power_mw=self.max_power,
            macs=self.target_macs,
            weight_bytes=self.target_weights,
        )

    @property
    def floor(self) -> Floor | None:
        """The accuracy floor, if one was given."""
        return floor_of(self.accuracy_floor, self.max_drop)

    def or_default(self) -> "Goal":
        """Half the dense latency where neither a target nor a floor was given."""
        given = self.targets() or self.floor is not None
        return self if given else msgspec.structs.replace(self, target_latency="0.5x")


class Run(Record, frozen=True, kw_only=True):
    """What a run folder was made for: `--resume` goes on only with the same."""

    KIND: ClassVar[str] = "run"
    FORMAT: ClassVar[int] = 2

    model: ModelIdentity
    calibration_sha256: str
    heldout_sha256: str
    labels: tuple[str, ...] | None
    preprocess: Preprocess
    target_latency: str | None
    allocator: str
    criterion: str
    engine: str
    threads: int
    patterns: tuple[str, ...]
    target_energy: str | None = None
    max_power: str | None = None
    target_macs: str | None = None
    target_weights: str | None = None
    allow_estimated_energy: bool = False
    accuracy_floor: float | None = None
    max_drop: float | None = None
    rotate: bool | None = None


def start(job: Job, goal: Goal, *, resume: bool, overwrite: bool) -> None:
    """Make the run folder ready. Raises MismatchError when it holds another run."""
    run = Run(
        model=job.model.identity,
        calibration_sha256=content_sha256(job.calibration),
        heldout_sha256=content_sha256(job.heldout),
        labels=job.model.labels,
        preprocess=job.model.preprocess,
        target_latency=goal.target_latency,
        target_energy=goal.target_energy,
        max_power=goal.max_power,
        target_macs=goal.target_macs,
        target_weights=goal.target_weights,
        allow_estimated_energy=goal.allow_estimated_energy,
        accuracy_floor=goal.accuracy_floor,
        max_drop=goal.max_drop,
        rotate=goal.rotate,
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
        for folder in (STEPS_FOLDER, PRUNE_FOLDER):
            shutil.rmtree(job.path(folder), ignore_errors=True)
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
