"""Norms and biases follow the dense model's answers; nothing else moves."""

import copy
from pathlib import Path

import pytest

pytest.importorskip("timm")
import torch
from torch import nn

from lpvit_edge import files, steps
from lpvit_edge.errors import PruningError, UnknownOptionError
from lpvit_edge.layers import Walk, walk
from lpvit_edge.match_outputs import match_outputs, refuse_moved
from lpvit_edge.matching import Matching, MatchLog
from lpvit_edge.models import load_model
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, prune
from lpvit_edge.prune_cli import prune as prune_verb
from lpvit_edge.prune_step import prune as prune_step
from tests.test_finetune import allocation_for
from tests.test_optimize import make_job

SETTINGS = Matching(steps=40, batch=16, judge_every=10)
Subject = tuple[nn.Module, nn.Module, Walk, torch.Tensor]


@pytest.fixture(scope="module")
def subject(tiny_project: Path) -> Subject:
    """A dense and a pruned model, and images."""
    dense = load_model(str(tiny_project / "model.toml")).module
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 3, 32, 32, generator=generator)
    images = torch.einsum("nb,bchw->nchw", torch.randn(64, 6, generator=generator), basis)
    images += 0.3 * torch.randn(images.shape, generator=generator)
    walked = walk(dense, image_size=32)
    form = Form(pattern=parse_pattern("64x1"), sparsity=0.8)
    forms = {layer.name: form for layer in walked.layers}
    *_, (_, pruned) = prune(dense, walked, forms, images)
    return dense, pruned, walked, images


def test_matching_lowers_the_loss_and_moves_norms_and_biases_alone(subject: Subject) -> None:
    dense, pruned, walked, images = subject
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    found = match_outputs(dense, pruned, walked, images, settings=SETTINGS)
    assert found.loss_after < 0.98 * found.loss_before
    assert (found.images, found.images_apart) == (48, 16)
    after = found.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.endswith("bias") or "norm" in name for name in moved)
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in before.items())


def test_two_runs_give_the_same_weights(subject: Subject) -> None:
    dense, pruned, walked, images = subject
    settings = Matching(steps=6, batch=16, judge_every=3)
    one, two = (match_outputs(dense, pruned, walked, images, settings=settings) for _ in range(2))
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name]), name


def test_where_no_step_is_better_the_pruned_weights_stay(subject: Subject) -> None:
    dense, pruned, walked, images = subject
    settings = Matching(steps=3, batch=16, learning_rate=30.0, judge_every=1)
    found = match_outputs(dense, pruned, walked, images, settings=settings)
    assert (found.kept_step, found.loss_after) == (0, found.loss_before)
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, pruned.state_dict()[name]), name


def test_a_weight_that_moved_is_refused_by_name(subject: Subject) -> None:
    _, pruned, _, _ = subject
    other = copy.deepcopy(pruned)
    with torch.no_grad():
        other.get_parameter("blocks.0.mlp.fc1.weight")[0, 0] += 1.0
    with pytest.raises(PruningError, match=r"changed blocks.0.mlp.fc1.weight"):
        refuse_moved(pruned, other, {})


def test_too_few_images_are_refused(subject: Subject) -> None:
    dense, pruned, walked, images = subject
    with pytest.raises(PruningError, match="7 calibration images are too few"):
        match_outputs(dense, pruned, walked, images[:7])


def test_the_step_writes_what_matching_did_and_forgets_it_without(
    tiny_project: Path, tmp_path: Path
) -> None:
    job = make_job(tiny_project, tmp_path)
    allocation = allocation_for(job)
    files.save(allocation, job.path("allocation.json"))
    log = prune_step(job, allocation, matching=Matching(steps=2, batch=16, judge_every=1))
    matched = files.load(MatchLog, job.path("matching.json"))
    assert matched.model_sha256 == log.model_sha256
    assert "outputs matched" in log.method
    weights = steps.pruned_weights(job)
    for name, form in steps.forms(allocation).items():
        zeros = float((weights[f"{name}.weight"] == 0).float().mean())
        assert zeros == pytest.approx(form.sparsity, abs=0.02)
    prune_step(job, allocation)
    assert not job.path("matching.json").exists()


def test_the_step_weighs_outputs_if_asked_and_says_so(tiny_project: Path, tmp_path: Path) -> None:
    job = make_job(tiny_project, tmp_path)
    allocation = allocation_for(job)
    files.save(allocation, job.path("allocation.json"))
    assert "outputs weighed" not in prune_step(job, allocation).method
    plain = steps.pruned_weights(job)
    assert "outputs weighed" in prune_step(job, allocation, weigh_outputs=True).method
    weighed = steps.pruned_weights(job)
    moved = {
        name
        for name in steps.forms(allocation)
        if not torch.equal(plain[f"{name}.weight"] == 0, weighed[f"{name}.weight"] == 0)
    }
    assert moved


def test_outputs_that_are_reordered_cannot_be_weighed(tmp_path: Path) -> None:
    with pytest.raises(UnknownOptionError, match=r"--reorder and --weigh-outputs: .* one of them"):
        prune_verb("model.toml", out=tmp_path, reorder=True, weigh_outputs=True)
