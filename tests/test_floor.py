"""The accuracy floor: bounds that hold what they promise, and a search that goes back."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpvit_edge import files, run_folder
from lpvit_edge import optimize as main_job
from lpvit_edge.confidence import one_sided_z, tango_upper, wilson
from lpvit_edge.errors import AccuracyFloorError, DataError, UnknownOptionError
from lpvit_edge.floor import (
    STEPS,
    Floor,
    FloorSearch,
    Paired,
    bisect,
    floor_of,
    images_needed,
    judge,
    refuse_unprovable,
)
from lpvit_edge.job import Job
from lpvit_edge.records import Allocation, DeviceProfile, GemmCost, LayerShape, PruneLog
from lpvit_edge.result import load_document
from tests import device_records

Z95 = one_sided_z(0.95)


def test_the_wilson_interval_is_the_textbook_one() -> None:
    low, high = wilson(90, 100)
    assert low == pytest.approx(0.8256, abs=1e-4)
    assert high == pytest.approx(0.9448, abs=1e-4)


def test_the_bound_of_a_drop_is_known_where_no_image_differs() -> None:
    # Tango's statistic is then -n d / sqrt(n d (1 - d)), so d = z^2 / (n + z^2).
    assert tango_upper(0, 0, 2000, z=2.0) == pytest.approx(4.0 / 2004.0)


def test_the_test_of_no_drop_is_mcnemars() -> None:
    lost, won, total = 30, 18, 500
    mcnemar = (lost - won) / math.sqrt(lost + won)
    # The lower bound of the drop, from the other side, is zero exactly at McNemar's statistic.
    assert -tango_upper(won, lost, total, z=mcnemar) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("drop", "p_won"), [(0.03, 0.0), (0.03, 0.02), (0.1, 0.01), (0.01, 0.02)])
def test_a_drop_beyond_its_bound_is_as_rare_as_a_step_may_have_it(
    drop: float, p_won: float
) -> None:
    """Exact, over all outcomes for 150 images."""
    total, p_lost, error = 150, drop + p_won, 0.05 / STEPS
    z = one_sided_z(1 - error)

    def chance(lost: int, won: int) -> float:
        ways = math.comb(total, lost) * math.comb(total - lost, won)
        return float(
            ways * p_lost**lost * p_won**won * (1 - p_lost - p_won) ** (total - lost - won)
        )

    beyond = sum(
        chance(lost, won)
        for lost in range(50)
        for won in range(20)
        if tango_upper(lost, won, total, z=z) < drop
    )
    assert beyond <= error


@given(st.integers(0, 50), st.integers(0, 50), st.integers(200, 2000))
def test_the_bound_lies_above_the_drop_and_shrinks_with_more_images(
    lost: int, won: int, total: int
) -> None:
    bound = tango_upper(lost, won, total, z=Z95)
    assert (lost - won) / total < bound < 1.0
    assert tango_upper(4 * lost, 4 * won, 4 * total, z=Z95) < bound


def answers(images: int, lost: int, won: int) -> Paired:
    dense = images - won  # the dense model is right wherever the pruned one does not win
    return Paired(
        images=images, dense_correct=dense, correct=dense - lost + won, lost=lost, won=won
    )


def test_a_floor_holds_by_its_bound_not_by_what_was_measured() -> None:
    at_floor = Paired(images=1000, dense_correct=1000, correct=950, lost=50, won=0)
    assert not judge(Floor(accuracy=0.95), at_floor).holds
    assert judge(Floor(accuracy=0.93), at_floor).holds
    assert not judge(Floor(max_drop=0.05), at_floor).holds
    assert judge(Floor(max_drop=0.075), at_floor).holds
    assert not judge(Floor(accuracy=0.93, max_drop=0.05), at_floor).holds


def test_the_error_of_a_step_is_a_sixth_of_the_whole() -> None:
    step = judge(Floor(accuracy=0.5), answers(500, 40, 10))
    z = one_sided_z(1 - 0.05 / STEPS)
    assert step.accuracy_low == wilson(460, 500, z=z)[0]
    assert step.drop_high == tango_upper(40, 10, 500, z=z)


def test_the_number_of_images_that_would_do_does_and_fewer_do_not() -> None:
    floor, found = Floor(max_drop=0.01), answers(500, 2, 0)
    assert not judge(floor, found).holds
    needed = images_needed(floor, found)
    assert needed is not None

    def holds(images: float) -> bool:
        lost = 2 * images / 500
        return tango_upper(lost, 0, images, z=one_sided_z(1 - 0.05 / STEPS)) <= 0.01

    assert holds(needed)
    assert not holds(0.98 * needed)
    assert images_needed(floor, answers(500, 6, 0)) is None


def test_images_that_cannot_prove_the_floor_are_refused_with_how_many_would() -> None:
    with pytest.raises(AccuracyFloorError, match=r"200 held-out images cannot prove .* give \d+"):
        refuse_unprovable(Floor(max_drop=0.01), 200)
    with pytest.raises(AccuracyFloorError, match=r"an accuracy of at least 99\.9 %"):
        refuse_unprovable(Floor(accuracy=0.999), 2000)
    refuse_unprovable(Floor(accuracy=0.95, max_drop=0.01), 2000)


@pytest.mark.parametrize(
    ("accuracy", "drop"), [(95.0, None), (0.0, None), (None, 0.0), (None, -1.0)]
)
def test_a_floor_that_says_nothing_is_refused(accuracy: float | None, drop: float | None) -> None:
    with pytest.raises(UnknownOptionError, match=r"--accuracy-floor|--max-drop"):
        floor_of(accuracy, drop)


@pytest.mark.parametrize("true", [0.0, 0.1, 0.37, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("first", [0.5, 1.0])
def test_bisection_comes_within_a_step_of_the_true_strength(true: float, first: float) -> None:
    tried: list[float] = []

    def holds(strength: float) -> bool:
        tried.append(strength)
        return strength <= true

    found = bisect(holds, first=first)
    assert len(tried) <= STEPS
    assert true - 2.0 ** -(STEPS - 1) <= found <= true
    assert tried[0] == first


# The main job with a floor, on a tiny model whose held-out images carry its own answers as labels:
# the dense accuracy is 100 % and what pruning changes is lost.


@pytest.fixture(scope="module")
def project(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    import numpy as np
    from PIL import Image

    from lpvit_edge.evaluate import answers as classes_of
    from lpvit_edge.images import scan_folder
    from lpvit_edge.models import load_model
    from tests.conftest import LABELS

    folder = tmp_path_factory.mktemp("floor") / "project"
    shutil.copytree(tiny_project, folder)
    shutil.rmtree(folder / "heldout")
    unsorted = folder / "unsorted"
    unsorted.mkdir()
    generator = np.random.default_rng(5)
    for index in range(240):
        pixels = generator.normal(generator.uniform(30, 220), 50, (32, 32, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(unsorted / f"{index:03d}.png")
    (unsorted / "120_corrupt.png").write_text("no image")
    model = load_model(str(folder / "model.toml"))
    images = scan_folder(unsorted, labels=None)
    found = classes_of(model.module, images, model.preprocess, what="labels")
    assert list(found).count(-1) == 1  # the corrupt one, and its neighbours are not lost with it
    for label in LABELS:
        (folder / "heldout" / label).mkdir(parents=True)
    for path, index in zip(images.paths, found, strict=True):
        path.rename(folder / "heldout" / LABELS[max(index, 0)] / path.name)
    unsorted.rmdir()
    return folder


def goal(**changes: Any) -> run_folder.Goal:
    quick = run_folder.Goal(network_seconds=0.02, check_seconds=0.05, curve=False)
    return msgspec.structs.replace(quick, **changes)


@pytest.fixture(scope="module")
def profiled(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job with dense.onnx and a profile in which every layer gains in proportion to its zeros."""
    from lpvit_edge.steps import export_model
    from lpvit_profilers.device import fingerprint, identify
    from tests.test_optimize import make_job

    job = make_job(project, tmp_path_factory.mktemp("runs") / "run")
    export_model(job, job.model.module, {}, job.path("dense.onnx"))
    identity = identify()
    profile = msgspec.structs.replace(
        device_records.profile(quality="unavailable"),
        device=msgspec.to_builtins(identity),
        fingerprint=fingerprint(identity),
        model=job.model.identity,
        layers=job.walk.layers,
        gemms=tuple(forms_of(job.walk.layers, job.patterns)),
    )
    files.save(profile, job.path("device_profile.json"))
    return job


def forms_of(layers: tuple[LayerShape, ...], patterns: tuple[str, ...]) -> Iterator[GemmCost]:
    """Every distinct layer, 1 ms dense and less by its zeros in each pattern."""
    shapes = {msgspec.structs.replace(layer, name="") for layer in layers}
    for shape in shapes:
        for pattern in ("dense", *patterns):
            for sparsity in (0.0,) if pattern == "dense" else (0.2, 0.9):
                yield GemmCost(
                    tokens=shape.tokens,
                    in_features=shape.in_features,
                    out_features=shape.out_features,
                    activation=shape.activation,
                    pattern=pattern,
                    sparsity=sparsity,
                    latency_ms=1.0 - sparsity,
                    spread_ms=0.0,
                    stable=True,
                )


def copied(job: Job, folder: Path) -> Job:
    shutil.copytree(job.folder, folder / "run")
    return msgspec.structs.replace(job, folder=folder / "run")


def test_without_a_target_it_goes_as_far_as_the_floor_allows_and_resumes(
    profiled: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job, asked = copied(profiled, tmp_path), goal(max_drop=12.0)
    with monkeypatch.context() as patch:  # interrupted in the third step
        patch.setattr("lpvit_edge.floor_search.judge", interrupting(judge, after=2))
        with pytest.raises(KeyboardInterrupt):
            main_job.optimize(job, asked)
    before = files.load(FloorSearch, job.path("floor.json"))
    assert len(before.steps) == 2
    document = main_job.optimize(job, asked)
    search = files.load(FloorSearch, job.path("floor.json"))
    assert search.steps[:2] == before.steps
    assert len(search.steps) == STEPS
    kept = [step for step in search.steps if step.verdict.holds]
    broken = [step for step in search.steps if not step.verdict.holds]
    assert kept
    assert broken
    best = max(kept, key=lambda step: step.strength)
    assert best.strength < min(step.strength for step in broken)
    assert best.answers.dense_correct == best.answers.images == 240
    assert best.verdict.drop_high <= 0.12
    assert files.sha256_of(job.path("allocation.json")) == best.allocation_sha256
    log = files.load(PruneLog, job.path("prune.json"))
    assert log.allocation_sha256 == best.allocation_sha256
    assert log.model_sha256 == files.sha256_of(job.path("model.safetensors"))
    assert "rotated" in log.method
    assert not job.path("floor").exists()
    assert document["accuracy_floor"]["held"]
    assert document["accuracy_drop"] == pytest.approx(best.answers.lost / 240)
    assert load_document(job.path("optimize.json"))["accuracy_floor"] is not None
    html = job.path("report.html").read_text(encoding="utf-8")
    assert "Accuracy floor held: asked for a drop of at most 12 points" in html
    said = capsys.readouterr().err
    assert "kept" in said
    assert "below the floor, back" in said


def interrupting(function: Any, *, after: int) -> Any:
    calls: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


def test_from_a_target_that_breaks_the_floor_it_goes_back_and_says_that_it_is_not_met(
    profiled: Job, tmp_path: Path
) -> None:
    job = copied(profiled, tmp_path)
    document = main_job.optimize(job, goal(max_drop=12.0, target_macs="0.05x"))
    search = files.load(FloorSearch, job.path("floor.json"))
    assert search.steps[0].strength == 1.0
    assert not search.steps[0].verdict.holds
    assert document["accuracy_floor"]["held"]
    assert document["target_met"] is False


def test_a_target_that_holds_the_floor_is_the_only_step(profiled: Job, tmp_path: Path) -> None:
    job = copied(profiled, tmp_path)
    document = main_job.optimize(job, goal(max_drop=40.0, target_macs="0.9x"))
    assert [s.strength for s in files.load(FloorSearch, job.path("floor.json")).steps] == [1.0]
    assert document["target_met"]
    allocation = files.load(Allocation, job.path("allocation.json"))
    assert allocation.bound == ("macs",)


def test_when_even_the_weakest_step_fails_every_accuracy_and_what_helps_is_said(
    profiled: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = copied(profiled, tmp_path)

    def half_lost(dense: Any, pruned: Any, images: Any) -> Paired:
        return answers(240, lost=0 if pruned is dense else 120, won=0)

    monkeypatch.setattr("lpvit_edge.evaluate.paired", half_lost)
    with pytest.raises(AccuracyFloorError) as caught:
        main_job.optimize(job, goal(accuracy_floor=0.9))
    assert caught.value.exit_code == 5
    assert "even the weakest step breaks an accuracy of at least 90 % (dense 100.00 %)" in str(
        caught.value
    )
    assert str(caught.value).count("50.00 % (at least") == STEPS
    assert "More held-out images would not help" in str(caught.value)
    assert not job.path("allocation.json").exists()


def test_a_dense_model_below_the_floor_is_refused_before_anything_is_pruned(
    tiny_project: Path, profiled: Job, tmp_path: Path
) -> None:
    from tests.test_optimize import make_job

    job = make_job(tiny_project, tmp_path / "run", heldout=tiny_project / "heldout")
    shutil.copytree(profiled.folder, job.folder)
    with pytest.raises(AccuracyFloorError, match="the dense model itself does not hold"):
        main_job.optimize(job, goal(accuracy_floor=0.6))
    assert not job.path("floor.json").exists()


def test_a_floor_without_labels_is_refused(profiled: Job, tmp_path: Path) -> None:
    blind = msgspec.structs.replace(profiled.heldout, targets=None)
    job = msgspec.structs.replace(copied(profiled, tmp_path), heldout=blind)
    with pytest.raises(DataError, match="an accuracy floor needs labelled held-out images"):
        main_job.optimize(job, goal(max_drop=20.0))


def test_a_device_on_which_nothing_gains_is_told_apart_from_a_low_floor(
    profiled: Job, tmp_path: Path
) -> None:
    from lpvit_edge.errors import BudgetNotMetError

    job = copied(profiled, tmp_path)
    profile = files.load(DeviceProfile, job.path("device_profile.json"))
    flat = [msgspec.structs.replace(g, latency_ms=1.0) for g in profile.gemms]
    files.save(msgspec.structs.replace(profile, gemms=tuple(flat)), job.path("device_profile.json"))
    with pytest.raises(BudgetNotMetError, match="no layer has a form that is faster than dense"):
        main_job.optimize(job, goal(max_drop=20.0))
