"""Find the strongest allocation that keeps the accuracy floor: prune, repair, judge, step by step.

Each step lives in a folder of its own until the best one is taken over; floor.json has what was
tried, so that an interrupted search goes on where it stopped.
"""

import shutil
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge import basis, files, prune_step, steps, weights
from lpvit_edge.allocate_timed import allocate_timed, allocated
from lpvit_edge.errors import BudgetNotMetError
from lpvit_edge.floor import (
    CONFIDENCE,
    STEPS,
    Floor,
    FloorSearch,
    FloorStep,
    bisect,
    described,
    judge,
    refuse_all_below,
    refuse_dense_below,
)
from lpvit_edge.images import content_sha256
from lpvit_edge.job import Job
from lpvit_edge.layer_options import layer_options
from lpvit_edge.network_cost import dense_totals
from lpvit_edge.progress import say
from lpvit_edge.records import Allocation, DeviceProfile, PruneLog, Sensitivity
from lpvit_edge.run_folder import STEPS_FOLDER, Goal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


def find_strongest(
    job: Job,
    profile: DeviceProfile,
    curves: Sensitivity,
    goal: Goal,
    floor: Floor,
    *,
    budget: Mapping[str, float],
) -> Allocation:
    """Leave the best step's allocation.json, model.safetensors and prune.json in the run folder.

    With targets the search begins at them and goes back where the floor breaks; without any it
    goes as far as the floor allows. Raises AccuracyFloorError when no step holds, or when the
    held-out images could not prove it; BudgetNotMetError when the targets cannot be reached.
    """
    search = _Search(job, profile, curves, goal, floor, budget)
    strongest = bisect(search.holds, first=1.0 if budget else 0.5)
    refuse_all_below(search.record)
    return search.take_over(strongest)


class _Search:
    """What the steps of one search share: the dense answers, and the steps so far."""

    def __init__(
        self,
        job: Job,
        profile: DeviceProfile,
        curves: Sensitivity,
        goal: Goal,
        floor: Floor,
        budget: Mapping[str, float],
    ) -> None:
        self.job, self.profile, self.curves, self.goal = job, profile, curves, goal
        self.turned = basis.of(job, curves.basis_sha256)  # its file is not in a step's folder
        self.budget = budget
        self.ends = _ends(profile, curves, goal, budget)
        self.record = self._resumed(floor)
        self.dense_answers = self._dense_answers()

    def _resumed(self, floor: Floor) -> FloorSearch:
        fresh = FloorSearch(
            model=self.job.model.identity,
            calibration_sha256=content_sha256(self.job.calibration),
            heldout_sha256=content_sha256(self.job.heldout),
            floor=floor,
            confidence=CONFIDENCE,
            tests=STEPS,
            steps=(),
        )
        path = self.job.path("floor.json")
        if not path.exists():
            return fresh
        found = files.load(FloorSearch, path)
        return found if msgspec.structs.replace(found, steps=()) == fresh else fresh

    def _dense_answers(self) -> "NDArray[np.int64]":
        from lpvit_edge.evaluate import answers, paired

        model, images = self.job.model, self.job.heldout
        found = answers(model.module, images, model.preprocess, what="floor: dense accuracy")
        refuse_dense_below(self.record.floor, paired(found, found, images))
        return found

    def holds(self, strength: float) -> bool:
        """Try one strength, or find it among the steps of an interrupted search."""
        known = [step for step in self.record.steps if step.strength == strength]
        step = known[0] if known else self._tried(strength)
        if step is None:
            say(f"floor: {strength:.2f} of the way cannot be allocated: back")
            return False
        where = f"{step.predicted_share:.2f}x of the dense latency predicted"
        verdict = "kept" if step.verdict.holds else "below the floor, back"
        say(f"floor: {where}: {described(step.answers, step.verdict)}: {verdict}")
        return step.verdict.holds

    def _tried(self, strength: float) -> FloorStep | None:
        from lpvit_edge.evaluate import answers, paired

        started = time.perf_counter()
        step_job = self._step_job(strength)
        try:
            allocation = self._allocation(strength, step_job)
        except BudgetNotMetError:
            if strength == 1.0 and self.budget:
                raise  # the target itself cannot be reached: nothing to go back from
            return None
        chosen = files.sha256_of(step_job.path("allocation.json"))
        pruned = answers(
            self._pruned(step_job, allocation, chosen),
            self.job.heldout,
            self.job.model.preprocess,
            what=f"floor: step {len(self.record.steps) + 1}, accuracy",
        )
        counts = paired(self.dense_answers, pruned, self.job.heldout)
        step = FloorStep(
            strength=strength,
            budget=allocation.budget,
            predicted_latency_ms=allocation.predicted_latency_ms,
            predicted_share=allocation.predicted_latency_ms / allocation.predicted_dense_ms,
            distortion=allocation.distortion,
            allocation_sha256=chosen,
            answers=counts,
            verdict=judge(self.record.floor, counts),
            seconds=time.perf_counter() - started,
        )
        self.record = msgspec.structs.replace(self.record, steps=(*self.record.steps, step))
        files.save(self.record, self.job.path("floor.json"))
        return step

    def _step_job(self, strength: float) -> Job:
        folder = self.job.path(STEPS_FOLDER) / f"{strength:.6f}"
        return msgspec.structs.replace(self.turned, folder=folder)

    def _allocation(self, strength: float, step_job: Job) -> Allocation:
        path = step_job.path("allocation.json")
        if path.exists():
            return files.load(Allocation, path)
        limits = {key: dense + strength * (end - dense) for key, (dense, end) in self.ends.items()}
        timed = strength == 1.0 and "latency_ms" in self.budget
        made = (
            allocate_timed(self.job, self.profile, self.curves, self.goal, limits)
            if timed
            else allocated(self.profile, self.curves, self.goal, limits)
        )
        files.save(made, path)
        return made

    def _pruned(self, step_job: Job, allocation: Allocation, chosen: str) -> "nn.Module":
        log = step_job.path("prune.json")
        if not (log.exists() and files.load(PruneLog, log).allocation_sha256 == chosen):
            prune_step.prune(step_job, allocation)
        return weights.filled(self.job.model.module, steps.pruned_weights(step_job))

    def take_over(self, strength: float) -> Allocation:
        """Move the best step's files to the run folder and remove the others."""
        step_job = self._step_job(strength)
        allocation = files.load(Allocation, step_job.path("allocation.json"))
        for name in ("model.safetensors", "prune.json", "allocation.json"):
            source = step_job.path(name)
            if source.exists():
                files.replace_atomic(self.job.path(name), partial(shutil.copyfile, source))
        shutil.rmtree(self.job.path(STEPS_FOLDER))
        return allocation


def _ends(
    profile: DeviceProfile, curves: Sensitivity, goal: Goal, budget: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """Each limit at strength 0, where it does not bind, and at 1: the target, or the fastest."""
    dense_ms, fastest_ms = latency_range(profile, curves, goal)
    if not budget:
        if fastest_ms >= dense_ms:
            raise BudgetNotMetError(
                "no layer has a form that is faster than dense on this device: nothing to gain "
                "however low the floor; try other --patterns"
            )
        return {"latency_ms": (dense_ms, fastest_ms)}
    dense = {**dense_totals(profile), "latency_ms": dense_ms}
    return {key: (max(limit, dense[key] or limit), limit) for key, limit in budget.items()}


def latency_range(profile: DeviceProfile, curves: Sensitivity, goal: Goal) -> tuple[float, float]:
    """Predicted latency of all layers dense, and of all in their fastest form."""
    options = layer_options(profile, curves, criterion=goal.criterion)
    dense = profile.rest_ms + sum(opts[0].latency_ms for opts in options)
    fastest = profile.rest_ms + sum(min(o.latency_ms for o in opts) for opts in options)
    return dense, fastest
