"""Masked distillation: zeros stay zero, the loss falls, an interrupted run ends the same."""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("timm")

import torch

from lpvit_edge import distill, files, finetune, prune_step, steps, weights
from lpvit_edge.distill import NO_LABEL, loss_parts
from lpvit_edge.errors import DataError, MismatchError, PruningError
from lpvit_edge.finetune import Plan
from lpvit_edge.images import ImageFolder, scan_folder
from lpvit_edge.job import Job
from lpvit_edge.prune import Settings
from lpvit_edge.recipe import FinetuneLog, current
from lpvit_edge.records import Allocation, Choice
from tests.conftest import write_images

PLAN = Plan(epochs=3, batch=8, learning_rate=3e-4, hard=0.0, labels=0.0)
FORMS = {"attn.qkv": ("64x1", 0.6), "attn.proj": ("16x16", 0.5), "mlp.fc1": ("64x1", 0.7)}


def allocation_for(job: Job) -> Allocation:
    """Three layers of every block pruned hard, by hand."""
    choices = [
        Choice(
            layer=layer.name,
            pattern=pattern,
            sparsity=sparsity,
            latency_ms=1.0,
            dense_latency_ms=1.0,
            distortion=0.0,
        )
        for layer in job.walk.layers
        for pattern, sparsity in [FORMS.get(layer.name.split(".", 2)[2], ("dense", 0.0))]
    ]
    return Allocation(
        model=job.model.identity,
        fingerprint="f",
        allocator="milp",
        criterion="hessian",
        budget={},
        choices=tuple(choices),
        predicted_latency_ms=1.0,
        predicted_dense_ms=1.0,
        distortion=0.0,
        bound=(),
    )


@pytest.fixture(scope="module")
def pruned(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    from tests.test_optimize import make_job

    job = make_job(tiny_project, tmp_path_factory.mktemp("runs") / "run")
    files.save(allocation_for(job), job.path("allocation.json"))
    # Not repaired, so that there is something left to learn.
    settings = Settings(selection="magnitude", repair=False)
    prune_step.prune(job, allocation_for(job), settings=settings)
    return job


def copied(job: Job, folder: Path) -> Job:
    shutil.copytree(job.folder, folder / "run")
    return msgspec.structs.replace(job, folder=folder / "run")


def tuned(job: Job, images: ImageFolder | None = None, **options: Any) -> FinetuneLog:
    plan = options.pop("plan", PLAN)
    return finetune.finetune(job, allocation_for(job), images or job.calibration, plan, **options)


def zeros(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor == 0
        for name, tensor in weights.items()
        if name.removesuffix(".weight").split(".", 2)[-1] in FORMS
    }


def test_the_loss_falls_and_every_removed_weight_stays_zero(pruned: Job, tmp_path: Path) -> None:
    job = copied(pruned, tmp_path)
    before = steps.pruned_weights(job)
    record = tuned(job)
    after = steps.pruned_weights(job)
    assert record.history[-1].soft < 0.7 * record.history[0].soft
    removed = zeros(before)
    assert len(removed) == 6
    for name, mask in removed.items():
        assert bool(mask.any()), name
        assert bool((after[name][mask] == 0).all()), name
        assert not torch.equal(after[name], before[name]), name
    assert record.masked_weights == sum(int(mask.sum()) for mask in removed.values())
    assert record.history[-1].learning_rate < 0.1 * PLAN.learning_rate
    assert not job.path(finetune.STATE).exists()
    assert files.load(FinetuneLog, job.path("finetune.json")) == record
    assert current(job.folder, record.model_sha256) == record


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    pruned: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = copied(pruned, tmp_path / "whole"), copied(pruned, tmp_path / "parts")
    expected = tuned(whole)
    real = distill.refuse_violated

    def interrupted(*arguments: Any, epoch: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        real(*arguments, epoch=epoch)

    with monkeypatch.context() as patch:
        patch.setattr("lpvit_edge.distill.refuse_violated", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuned(parts)
    with pytest.raises(MismatchError, match=r"left from an interrupted run; pass --resume"):
        tuned(parts)
    other = msgspec.structs.replace(PLAN, temperature=3.0)
    with pytest.raises(MismatchError, match=r"temperature was 2\.0, now 3\.0"):
        tuned(parts, plan=other, resume=True)
    resumed = tuned(parts, resume=True)
    assert resumed.model_sha256 == expected.model_sha256
    assert [e.soft for e in resumed.history] == [e.soft for e in expected.history]


def test_a_mask_that_is_violated_stops_it_and_leaves_the_weights(
    pruned: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = copied(pruned, tmp_path)
    before = job.path("model.safetensors").read_bytes()
    monkeypatch.setattr("lpvit_edge.distill.hold_masks", lambda *_: None)
    with pytest.raises(PruningError, match=r"after epoch 1 .* are not zero: blocks\.0\.attn\.qkv"):
        tuned(job)
    assert job.path("model.safetensors").read_bytes() == before
    assert not job.path("finetune.json").exists()


def test_images_without_labels_are_enough(pruned: Job, tmp_path: Path) -> None:
    write_images(tmp_path / "classes", seed=9, per_class=6)
    (tmp_path / "flat").mkdir()
    for index, path in enumerate(sorted((tmp_path / "classes").rglob("*.png"))):
        path.rename(tmp_path / "flat" / f"{index}.png")
    (tmp_path / "flat" / "cut.png").write_text("no image")
    images = scan_folder(tmp_path / "flat", labels=None)
    record = tuned(copied(pruned, tmp_path), images)
    assert record.images == 18
    assert "cut.png: not a readable image" in record.skipped[0]
    assert {epoch.labels for epoch in record.history} == {0.0}
    assert record.history[-1].soft < record.history[0].soft


def test_labels_that_are_missing_take_no_part_in_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 3, generator=generator) for _ in range(2))
    labels = torch.tensor([0, NO_LABEL, 2, NO_LABEL])
    parts = loss_parts(student, teacher, labels, temperature=2.0)
    known = torch.nn.functional.cross_entropy(student[[0, 2]], torch.tensor([0, 2]))
    assert parts["labels"] == pytest.approx(float(known))
    p, q = (torch.softmax(logits / 2.0, 1) for logits in (teacher, student))
    assert float(parts["soft"]) == pytest.approx(float(4 * (p * (p / q).log()).sum(1).mean()))
    same = loss_parts(teacher, teacher, labels, temperature=2.0)
    assert float(same["soft"]) == pytest.approx(0.0, abs=1e-6)


def test_what_was_fine_tuned_is_not_fine_tuned_again_by_mistake(
    pruned: Job, tmp_path: Path
) -> None:
    job = copied(pruned, tmp_path)
    tuned(job, plan=msgspec.structs.replace(PLAN, epochs=1))
    with pytest.raises(MismatchError, match="fine-tuned already; run `lpvit prune` again"):
        tuned(job)


def test_training_images_that_are_held_out_are_refused(pruned: Job, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="12 training images are also held out"):
        tuned(copied(pruned, tmp_path), pruned.heldout)


def test_fewer_images_than_one_batch_are_refused(pruned: Job, tmp_path: Path) -> None:
    plan = msgspec.structs.replace(PLAN, batch=25)
    with pytest.raises(DataError, match="24 training images in batches of 25"):
        tuned(copied(pruned, tmp_path), plan=plan)


def test_weights_that_are_not_pruned_are_refused(pruned: Job, tmp_path: Path) -> None:
    with pytest.raises(PruningError, match="no weight is zero; these are not pruned weights"):
        distill.masks_of(pruned.model.module, ("blocks.0.attn.qkv",))


def test_hard_answers_and_labels_are_learned_too(pruned: Job, tmp_path: Path) -> None:
    plan = msgspec.structs.replace(PLAN, hard=0.5, labels=0.5)
    history = tuned(copied(pruned, tmp_path), plan=plan).history
    assert history[-1].hard < history[0].hard
    assert history[-1].labels < history[0].labels


def test_the_export_takes_fine_tuned_weights_and_no_others(
    pruned: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        pass

    def reached(*_: object, **__: object) -> None:
        raise ReachedError

    monkeypatch.setattr("lpvit_edge.steps.export_model", reached)
    job = copied(pruned, tmp_path)
    tuned(job, plan=msgspec.structs.replace(PLAN, epochs=1))
    with pytest.raises(ReachedError):
        steps.export(job, allocation_for(job))
    weights.save(job.model.module, job.path("model.safetensors"))
    with pytest.raises(MismatchError, match=r"neither what prune\.json nor what finetune\.json"):
        steps.export(job, allocation_for(job))
