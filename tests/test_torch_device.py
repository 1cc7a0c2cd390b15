"""The device that torch works on: what meets there was made there, and what is saved is not."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("timm")
pytest.importorskip("safetensors")
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lpvit_edge import cli, files, optimize, prune_step, steps, torch_device
from lpvit_edge.allocate import allocate
from lpvit_edge.errors import EnvironmentUnfitError, UnknownOptionError
from lpvit_edge.layers import Walk
from lpvit_edge.match_outputs import match_outputs
from lpvit_edge.matching import Matching
from lpvit_edge.optimize import Curve
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import DoneLayer, Form, Settings, prune
from lpvit_edge.records import SensitivityCurve
from lpvit_edge.rotate import rotated
from lpvit_edge.run_folder import Goal
from lpvit_edge.sensitivity import gather_moments, layer_curves, output_fisher
from tests import device_records
from tests.fake_device import DEVICE, There, fake_device
from tests.test_finetune import allocation_for
from tests.test_optimize import make_job
from tests.test_rotate import pictures, vit

BLOCKS, TWO_FOUR = parse_pattern("16x16"), parse_pattern("2:4")


def on_both(work: Callable[[nn.Module, Walk, Tensor], Any]) -> tuple[Any, Any]:
    """What work(model, walk, images) gives on the processor, and on the fake device."""
    model, walked = vit()
    images = pictures(16)
    with sdpa_kernel(SDPBackend.MATH):  # the only attention that the fake device has
        expected = work(copy.deepcopy(model), walked, images)
        with fake_device():
            found = work(copy.deepcopy(model).to(DEVICE), walked, images.to(DEVICE))
    return expected, found


def state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model that lies whole on the fake device, or whole on the processor."""
    tensors = model.state_dict()
    assert len({value.device for value in tensors.values()}) == 1
    return {name: value.cpu() for name, value in tensors.items()}


def test_tensors_there_do_not_meet_tensors_here() -> None:
    with fake_device():
        there, here = torch.arange(3.0, device=DEVICE), torch.arange(3.0)
        assert isinstance(there, There)
        assert there.device == DEVICE
        assert (there + there).cpu().tolist() == [0.0, 2.0, 4.0]
        assert (there * torch.tensor(2.0)).cpu().tolist() == [0.0, 2.0, 4.0]
        mixtures: tuple[Callable[[], Tensor], ...] = (
            lambda: there + here,
            lambda: there.add_(here),
            lambda: here @ there,
            lambda: torch.cat([there, there.new_zeros(2), torch.zeros(1)]),
        )
        for mixed in mixtures:
            with pytest.raises(RuntimeError, match="two devices, lazy:0 and cpu!"):
                mixed()


def test_curves_are_the_same_on_another_device() -> None:
    def curves(model: nn.Module, walk: Walk, images: Tensor) -> list[SensitivityCurve]:
        moments = gather_moments(model, walk, images, None, patterns=(BLOCKS, TWO_FOUR), batch=8)
        found = list[SensitivityCurve]()
        for layer in walk.layers:
            module = model.get_submodule(layer.name)
            assert isinstance(module, nn.Linear)
            found += layer_curves(layer, module, moments[layer.name], images=len(images))
        return found

    expected, found = on_both(curves)
    assert len(expected) == 32
    for here, there in zip(expected, found, strict=True):
        assert (there.layer, there.pattern, there.criterion) == (
            here.layer,
            here.pattern,
            here.criterion,
        )
        assert there.distortion == pytest.approx(here.distortion, rel=1e-5)


@pytest.mark.parametrize("settings", [Settings(batch=8), Settings(batch=8, permute=True)])
@pytest.mark.parametrize("pattern", [BLOCKS, TWO_FOUR, parse_pattern("64x1")])
def test_pruned_weights_are_the_same_on_another_device(pattern: Any, settings: Settings) -> None:
    def pruned(model: nn.Module, walk: Walk, images: Tensor) -> dict[str, Tensor]:
        forms = {layer.name: Form(pattern=pattern, sparsity=0.5) for layer in walk.layers}
        *_, (_, result) = prune(model, walk, forms, images, settings=settings)
        return state(result)

    expected, found = on_both(pruned)
    torch.testing.assert_close(found, expected)


def test_row_weights_scores_and_finished_layers_may_lie_elsewhere() -> None:
    def pruned(model: nn.Module, walk: Walk, images: Tensor) -> dict[str, Tensor]:
        forms = {layer.name: Form(pattern=BLOCKS, sparsity=0.5) for layer in walk.layers}
        moments = gather_moments(model, walk, images, None, patterns=())
        weighed = {name: value.cpu() for name, value in output_fisher(moments).items()}
        (entry, result), *_ = prune(model, walk, forms, images, row_weights=weighed)
        first = walk.layers[0].name
        torch.manual_seed(0)
        scores = {
            layer.name: torch.rand(layer.out_features // 16, layer.in_features // 16)
            for layer in walk.layers
        }
        weight, bias = (state(result)[f"{first}.{own}"] for own in ("weight", "bias"))
        other = Settings(selection="scores")
        *_, (_, scored) = prune(
            model,
            walk,
            forms,
            images,
            settings=other,
            scores=scores,
            done={first: DoneLayer(entry=entry, weight=weight, bias=bias)},
        )
        return state(result) | {f"{name} by scores": x for name, x in state(scored).items()}

    expected, found = on_both(pruned)
    torch.testing.assert_close(found, expected)


def test_a_rotated_model_is_the_same_on_another_device() -> None:
    expected, found = on_both(lambda *given: state(rotated(*given)))
    torch.testing.assert_close(found, expected)


def test_outputs_are_matched_alike_on_another_device() -> None:
    def matched(model: nn.Module, walk: Walk, images: Tensor) -> dict[str, Tensor]:
        forms = {layer.name: Form(pattern=BLOCKS, sparsity=0.5) for layer in walk.layers}
        *_, (_, pruned) = prune(model, walk, forms, images)
        settings = Matching(steps=6, batch=4, judge_every=2)
        return state(match_outputs(model, pruned, walk, images, settings=settings).model)

    expected, found = on_both(matched)
    torch.testing.assert_close(found, expected)


def test_files_are_the_same_from_another_device_and_need_none(
    tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    monkeypatch.setattr(optimize, "CURVE_TARGETS", (0.5,))

    def made(folder: Path, device: str) -> Curve:
        job = msgspec.structs.replace(make_job(tiny_project, folder), device=device)
        curves = steps.sensitivity(job, rotate=True)
        allocation = msgspec.structs.replace(allocation_for(job), basis_sha256=curves.basis_sha256)
        files.save(allocation, job.path("allocation.json"))
        matching = Matching(steps=4, judge_every=2)
        prune_step.prune(job, allocation, weigh_outputs=True, matching=matching)
        assert {value.device.type for value in job.model.module.state_dict().values()} == {"cpu"}
        monkeypatch.setattr(optimize, "allocated", lambda *_: allocation)
        return optimize.budget_curve(job, device_records.profile(), curves, Goal())

    with sdpa_kernel(SDPBackend.MATH):
        expected = made(tmp_path / "here", "cpu")
        assert torch.backends.cudnn.allow_tf32
        with fake_device():
            assert made(tmp_path / "there", str(DEVICE)) == expected
    assert not torch.backends.cudnn.allow_tf32
    assert len(expected.points) == 2
    here, there = (
        steps.pruned_weights(make_job(tiny_project, tmp_path / folder))
        for folder in ("here", "there")
    )
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "mps", "cuda:0 ", "CUDA", ""])
def test_a_device_that_has_no_such_name_is_refused(name: str) -> None:
    with pytest.raises(UnknownOptionError, match="write cpu, cuda, or cuda:1"):
        torch_device.resolved(name)


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_that_torch_does_not_have_is_refused(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: index > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(
        EnvironmentUnfitError,
        match=rf"--device {name} asks for GPU {index},.* can use {index} here",
    ):
        torch_device.resolved(name)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert torch_device.resolved("cuda") == "cuda:0"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert torch_device.resolved("cuda") == "cuda:3"
    assert torch_device.resolved("cuda:2") == "cuda:2"
    assert torch_device.resolved("cpu") == "cpu"


@pytest.mark.parametrize("verb", ["sensitivity", "prune", "optimize"])
def test_the_verbs_refuse_a_device_before_they_load_a_model(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allocation = allocate(device_records.profile(), device_records.curves(), budget={})
    files.save(allocation, tmp_path / "allocation.json")
    arguments = ["no_such_model.toml", "--out", str(tmp_path), "--device", "tpu"]
    monkeypatch.setattr(sys, "argv", ["lpvit", verb, *arguments])
    assert cli.main() == 2
    assert "--device 'tpu'; write cpu" in capsys.readouterr().err
