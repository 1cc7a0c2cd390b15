"""The basis chosen with the curves is the one in which the allocation is pruned."""

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("timm")
pytest.importorskip("safetensors")
import torch
from torch import nn

from lpvit_edge import basis, files, prune_step, steps
from lpvit_edge.allocate import allocate
from lpvit_edge.errors import MismatchError, PruningError
from lpvit_edge.job import Job
from lpvit_edge.records import Allocation, Sensitivity
from tests import device_records
from tests.test_finetune import allocation_for
from tests.test_optimize import make_job

FILE = "rotated.safetensors"


def answers(job: Job) -> torch.Tensor:
    images, _, _ = steps.read_calibration(job)
    with torch.no_grad():
        found: torch.Tensor = job.model.module(images)
    return found


def allocation_of(job: Job, curves: Sensitivity) -> Allocation:
    found = msgspec.structs.replace(allocation_for(job), basis_sha256=curves.basis_sha256)
    files.save(found, job.path("allocation.json"))
    return found


def test_curves_allocation_and_pruned_weights_are_of_one_basis(
    tiny_project: Path, tmp_path: Path
) -> None:
    job = make_job(tiny_project, tmp_path)
    curves = steps.sensitivity(job)
    assert curves.basis_sha256 == files.sha256_of(tmp_path / FILE)
    turned = basis.of(job, curves.basis_sha256)
    torch.testing.assert_close(answers(turned), answers(job), rtol=1e-4, atol=1e-5)
    log = prune_step.prune(job, allocation_of(job, curves))
    assert log.method == "obs, repair on, rotated"
    tokens = steps.pruned_weights(job)["pos_embed"]  # which pruning leaves as they are
    torch.testing.assert_close(tokens, turned.model.module.state_dict()["pos_embed"])
    assert float((tokens - job.model.module.state_dict()["pos_embed"]).abs().max()) > 0.01


def test_an_allocation_says_of_which_basis_its_curves_are() -> None:
    curves = msgspec.structs.replace(device_records.curves(), basis_sha256="b")
    assert allocate(device_records.profile(), curves, budget={}).basis_sha256 == "b"


def test_without_a_rotation_the_model_stays_as_it_is(tiny_project: Path, tmp_path: Path) -> None:
    job = make_job(tiny_project, tmp_path)
    curves = steps.sensitivity(job, rotate=False)
    assert curves.basis_sha256 is None
    assert not (tmp_path / FILE).exists()
    assert basis.of(job, None) is job
    assert prune_step.prune(job, allocation_of(job, curves)).method == "obs, repair on"


def test_2_4_is_not_rotated_unless_asked(
    tiny_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tiny_project, tmp_path, engine="tensorrt", patterns=("2:4", "16x16"))
    assert steps.sensitivity(job).basis_sha256 is None
    assert "stay as they are: 2:4 loses by a rotation" in capsys.readouterr().err
    assert steps.sensitivity(job, rotate=True).basis_sha256 is not None


def test_a_model_that_allows_no_rotation_is_pruned_as_it_is_unless_asked(
    tiny_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tiny_project, tmp_path)
    job.model.module.norm_pre = nn.LayerNorm(64)
    assert steps.sensitivity(job).basis_sha256 is None
    assert "stay as they are: a LayerNorm opens" in capsys.readouterr().err
    with pytest.raises(PruningError, match=r"a LayerNorm opens .*; leave out --rotate"):
        steps.sensitivity(job, rotate=True)


def test_an_allocation_of_another_basis_is_refused(tiny_project: Path, tmp_path: Path) -> None:
    job = make_job(tiny_project, tmp_path)
    allocation = allocation_of(job, steps.sensitivity(job))
    again = r"another basis .*run `lpvit sensitivity` and `lpvit allocate` again"
    turned = basis.of(job, allocation.basis_sha256)
    with pytest.raises(MismatchError, match=again):
        basis.of(turned, None)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(MismatchError, match=again):
        prune_step.prune(job, allocation)
    path.unlink()
    with pytest.raises(MismatchError, match=r"here None\); run `lpvit sensitivity`"):
        prune_step.prune(job, allocation)
    with pytest.raises(MismatchError, match=again):
        basis.of(turned, None)  # as in the folder of a step, which has no such file
    assert not (tmp_path / "prune.json").exists()
