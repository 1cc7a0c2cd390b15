"""Walk the whole way: profile, sensitivity, allocate, prune, export, build, check, report."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec

from lpvit_edge import basis, files, prune_step, result, steps
from lpvit_edge.allocate_timed import allocate_timed, allocated
from lpvit_edge.budget import limits
from lpvit_edge.device_profile import profile_device
from lpvit_edge.errors import BudgetNotMetError, DeviceMismatchError, FileFormatError
from lpvit_edge.files import write_atomic
from lpvit_edge.floor import FloorSearch, outcome, refuse_unprovable
from lpvit_edge.floor_search import find_strongest
from lpvit_edge.job import Job
from lpvit_edge.network_cost import dense_totals
from lpvit_edge.progress import track
from lpvit_edge.recipe import current
from lpvit_edge.records import (
    Allocation,
    Check,
    DeviceProfile,
    ExportLog,
    Manifest,
    PruneLog,
    Record,
    Sensitivity,
)
from lpvit_edge.run_folder import Goal
from lpvit_edge.targets import judge
from lpvit_edge.torch_device import placed

if TYPE_CHECKING:
    from torch import nn

RecordT = TypeVar("RecordT", bound=Record)

CURVE_TARGETS = (0.8, 0.65, 0.5, 0.4, 0.3)
CURVE_IMAGES = 500


class Curve(Record, frozen=True, kw_only=True):
    """Accuracy over several budgets."""

    KIND: ClassVar[str] = "curve"

    points: tuple[result.CurvePoint, ...]


def optimize(job: Job, goal: Goal) -> dict[str, Any]:
    """The main job. What the run folder already holds is not made again.

    Raises BudgetNotMetError, with the best that is reachable, when the target cannot be met, and
    AccuracyFloorError when no step keeps the accuracy floor.
    """
    if goal.floor is not None:
        refuse_unprovable(goal.floor, len(job.heldout.paths))
    profile = _once(
        job,
        "device_profile.json",
        DeviceProfile,
        lambda: profile_device(
            job, seconds=goal.profile_seconds, network_seconds=goal.network_seconds
        ),
    )
    refuse_other_device(profile)
    curves = _once(
        job,
        "sensitivity.json",
        Sensitivity,
        lambda: steps.sensitivity(job, rotate=goal.rotate),
    )
    steps.refuse_other_model(curves.model, job.model.identity, what="sensitivity.json")
    budget = limits(goal.targets(), dense_totals(profile))
    allocation = _once(
        job,
        "allocation.json",
        Allocation,
        lambda: choose(job, profile, curves, goal, budget=budget),
    )
    export = _exported(job, allocation)
    check = _checked(job, goal, allocation, export)
    curve = _once(job, "curve.json", Curve, lambda: budget_curve(job, profile, curves, goal))
    return finish(job, goal, profile, allocation, export, check, curve, budget=budget)


def _exported(job: Job, allocation: Allocation) -> ExportLog:
    """Prune, repair and export."""
    chosen = files.sha256_of(job.path("allocation.json"))
    _once(
        job,
        "prune.json",
        PruneLog,
        lambda: prune_step.prune(job, allocation),
        fits=lambda log: log.allocation_sha256 == chosen,
    )
    weights = files.sha256_of(job.path("model.safetensors"))  # pruned, perhaps fine-tuned
    return _once(
        job,
        "export.json",
        ExportLog,
        lambda: steps.export(job, allocation),
        fits=lambda log: log.model_sha256 == weights,
    )


def _checked(job: Job, goal: Goal, allocation: Allocation, export: ExportLog) -> Check:
    """Build the engine and compare it with the dense one."""
    manifest = _once(
        job,
        "manifest.json",
        Manifest,
        lambda: steps.build(job),
        fits=lambda manifest: manifest.onnx_sha256 == export.onnx_sha256,
    )
    return _once(
        job,
        "check.json",
        Check,
        lambda: steps.check(job, allocation, seconds=goal.check_seconds),
        # model.onnx is the same file in every precision, and an older check does not name its own
        fits=lambda found: (
            (found.onnx_sha256, found.precision) == (export.onnx_sha256, manifest.precision)
        ),
    )


def _once(
    job: Job,
    name: str,
    kind: type[RecordT],
    make: Callable[[], RecordT],
    *,
    fits: Callable[[RecordT], bool] = lambda _: True,
) -> RecordT:
    """What the folder holds, unless it was made from something that has changed since."""
    path = job.path(name)
    if path.exists() and fits(found := files.load(kind, path)):
        return found
    return make()


def refuse_other_device(profile: DeviceProfile) -> None:
    """Raise DeviceMismatchError, naming the difference, for a profile of another machine."""
    from lpvit_profilers.device import DeviceIdentity, differences, fingerprint, identify

    here = identify()
    if fingerprint(here) == profile.fingerprint:
        return
    try:
        there = msgspec.convert(profile.device, DeviceIdentity)
    except msgspec.ValidationError as error:
        raise FileFormatError(f"device_profile.json: device: {error}") from error
    named = "; ".join(differences(there, here)) or "its fingerprint differs"
    raise DeviceMismatchError(
        f"the device profile was taken under other conditions: {named}. Measure this machine with "
        "--overwrite, or go back to that one"
    )


def choose(
    job: Job,
    profile: DeviceProfile,
    curves: Sensitivity,
    goal: Goal,
    *,
    budget: Mapping[str, float],
) -> Allocation:
    """Allocate within the budget, or as far as the accuracy floor allows. Writes allocation.json.

    Where latency is limited, the allocation is timed and corrected.
    """
    if goal.floor is not None:
        return find_strongest(job, profile, curves, goal, goal.floor, budget=budget)
    if "latency_ms" in budget:
        allocation = allocate_timed(job, profile, curves, goal, budget)
    else:
        allocation = allocated(profile, curves, goal, budget)
    files.save(allocation, job.path("allocation.json"))
    return allocation


def budget_curve(job: Job, profile: DeviceProfile, curves: Sensitivity, goal: Goal) -> Curve:
    """Accuracy of several budgets, by torch on some held-out images. Writes curve.json."""
    targets = CURVE_TARGETS if goal.curve else ()
    turned = placed(basis.of(job, curves.basis_sha256)) if targets else job
    points = [
        point
        for share in track(targets, what="curve: budgets", total=len(targets))
        if (point := _curve_point(turned, profile, curves, goal, share)) is not None
    ]
    if points:
        points.insert(0, _evaluated(job, job.model.module, 1.0, profile.dense.median_ms))
    record = Curve(points=tuple(points))
    files.save(record, job.path("curve.json"))
    return record


def _curve_point(
    job: Job, profile: DeviceProfile, curves: Sensitivity, goal: Goal, share: float
) -> result.CurvePoint | None:
    from lpvit_edge.prune import prune

    try:
        latency_only = {"latency_ms": share * profile.dense.median_ms}
        allocation = allocated(profile, curves, goal, latency_only)
    except BudgetNotMetError:
        return None  # this device cannot go so far; the curve ends earlier
    images, _, _ = steps.read_calibration(job, device=job.device)
    model = job.model.module
    for _, pruned in prune(model, job.walk, steps.forms(allocation), images):
        model = pruned
    return _evaluated(job, model, share, allocation.predicted_latency_ms)


def _evaluated(job: Job, model: "nn.Module", share: float, latency_ms: float) -> result.CurvePoint:
    from lpvit_edge.trial import torch_accuracy

    accuracy, count = torch_accuracy(model, job.heldout, job.model.preprocess, limit=CURVE_IMAGES)
    return result.CurvePoint(
        target=share, predicted_latency_ms=latency_ms, accuracy=accuracy, images=count
    )


def _floor_outcome(job: Job, goal: Goal, check: Check) -> dict[str, Any] | None:
    if goal.floor is None:
        return None
    return outcome(files.load(FloorSearch, job.path("floor.json")), check)


def finish(
    job: Job,
    goal: Goal,
    profile: DeviceProfile,
    allocation: Allocation,
    export: ExportLog,
    check: Check,
    curve: Curve,
    *,
    budget: Mapping[str, float],
) -> dict[str, Any]:
    """Write optimize.json and report.html and return the document."""
    from lpvit_edge.report import write_report

    assert check.precision is not None, "a check of an older format is made again"
    document = result.document(
        profile,
        allocation,
        export,
        check,
        precision=check.precision,
        targets=judge(goal.targets(), budget, allocation, check),
        floor=_floor_outcome(job, goal, check),
        finetuned=current(job.folder, export.model_sha256),
        curve=curve.points,
        report=str(job.path("report.html")),
    )
    write_report(document, job.path("report.html"))
    content = msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
    write_atomic(job.path("optimize.json"), content)
    return document
