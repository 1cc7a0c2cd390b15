"""The main job on a tiny model, through the real OpenVINO engine and the native kernel."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

import lpvit_engines
from lpvit_edge.bundle import open_bundle
from lpvit_edge.proof import proven_engine
from lpvit_engines.native import instruction_set
from tests.test_block_sparse_bf16 import ON_BF16

pytest.importorskip("timm")
pytest.importorskip("openvino")

from lpvit_edge import files, run_folder, steps
from lpvit_edge import optimize as main_job
from lpvit_edge.device_profile import profile_device
from lpvit_edge.errors import (
    BudgetNotMetError,
    DataError,
    DeviceMismatchError,
    FileFormatError,
    MismatchError,
    PruningError,
    UnknownOptionError,
)
from lpvit_edge.export import compare_runtimes
from lpvit_edge.job import Job, prepare
from lpvit_edge.models import load_model
from lpvit_edge.records import Allocation, Check, DeviceProfile, Manifest, PruneLog
from lpvit_edge.report import write_report
from lpvit_edge.result import load_document

# So generous that a busy machine meets it, since tests never assert a time. The profile is changed
# so that the dense layers seem to need more than that, see costlier().
GOAL = run_folder.Goal(
    target_latency="50x",
    network_seconds=0.02,
    check_seconds=0.05,
)


def make_job(project: Path, folder: Path, **changes: Any) -> Job:
    model = load_model(str(project / "model.toml"))
    arguments: dict[str, Any] = {
        "calibration": model.calibration,
        "heldout": model.heldout,
        "images": 24,
        "engine": "openvino",
        "threads": 1,
        "patterns": ("64x1", "16x16"),
    }
    return prepare(model, folder, **(arguments | changes))


@pytest.fixture(scope="module")
def finished(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A whole run, once; tests copy its folder before they change anything."""
    job = make_job(tiny_project, tmp_path_factory.mktemp("runs") / "run")
    run_folder.start(job, GOAL, resume=False, overwrite=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpvit_edge.profile.DEFAULT_SECONDS", 0.02)
        profile = profile_device(job, network_seconds=0.02)
    files.save(costlier(profile), job.path("device_profile.json"))
    main_job.optimize(job, GOAL)
    return job


def costlier(profile: DeviceProfile) -> DeviceProfile:
    """Each layer as if it took 10 dense networks, and less in proportion to its zeros.

    Then all layers dense exceed the target, and something has to be pruned on every machine.
    """
    unit_ms = 10 * profile.dense.median_ms
    gemms = [
        msgspec.structs.replace(g, latency_ms=unit_ms * (1.0 - g.sparsity)) for g in profile.gemms
    ]
    return msgspec.structs.replace(profile, gemms=tuple(gemms), rest_ms=0.0, factors={})


def copied(job: Job, folder: Path) -> Job:
    shutil.copytree(job.folder, folder / "run")
    return msgspec.structs.replace(job, folder=folder / "run")


def test_a_run_leaves_every_artefact_and_nothing_else(finished: Job) -> None:
    left = {path.name for path in finished.folder.iterdir()}
    # 24 calibration images are too few for a drift reference; no floor and no fine-tuning was
    # asked for.
    absent = {
        "device_profile.partial.json",
        "reference.json",
        "reference.safetensors",
        "dense_reference.json",
        "dense_reference.safetensors",
        "floor.json",
        "finetune.json",
        "finetune.state.pt",
        "matching.json",
    }
    assert left == set(run_folder.ARTEFACTS) - absent


def test_layers_were_really_pruned_and_run_by_the_native_kernel(finished: Job) -> None:
    allocation = files.load(Allocation, finished.path("allocation.json"))
    sparse = {c.layer for c in allocation.choices if c.pattern != "dense"}
    assert sparse
    assert allocation.predicted_latency_ms <= allocation.budget["latency_ms"] * (1 + 1e-9)
    log = files.load(PruneLog, finished.path("prune.json"))
    assert sparse <= {layer.layer for layer in log.layers}
    kernels = files.load(Manifest, finished.path("manifest.json")).kernels
    ours = {name: kernel for name, kernel in kernels.items() if kernel.startswith("lpvit_")}
    assert {name for name, kernel in ours.items() if " block " in kernel} == sparse
    assert sum(" attention " in kernel for kernel in ours.values()) == 2  # one in each block


def test_what_dense_onnx_is_held_against_is_the_model_as_it_was_not_the_rotated_one(
    finished: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = copied(finished, tmp_path)
    assert "rotated" in files.load(PruneLog, job.path("prune.json")).method
    job.path("export.json").unlink()
    job.path("rotated.safetensors").unlink()  # of what is pruned already nobody needs it
    compared = []

    def compare(model: Any, *args: Any, **kwargs: Any) -> Any:
        compared.append(model)
        return compare_runtimes(model, *args, **kwargs)

    monkeypatch.setattr("lpvit_edge.export.compare_runtimes", compare)
    main_job.optimize(job, GOAL)
    assert compared[1] is job.model.module


def test_a_default_build_is_noted_as_float32(finished: Job) -> None:
    assert files.load(Manifest, finished.path("manifest.json")).precision == "float32"


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=ON_BF16), "int8"])
def test_what_is_built_in_a_precision_is_checked_and_deployed_in_it(
    precision: Literal["bf16", "int8"],
    finished: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = copied(finished, tmp_path)
    manifest = steps.build(job, precision=precision)
    assert manifest.precision == precision
    isa = instruction_set(precision)
    assert any(kernel.startswith(f"lpvit_{isa} block") for kernel in manifest.kernels.values())
    with proven_engine(open_bundle(job.folder)) as engine:
        deployed = engine.kernels().items()
    ours = {name: kernel for name, kernel in manifest.kernels.items() if "lpvit_" in kernel}
    assert {name: kernel for name, kernel in deployed if "lpvit_" in kernel} == ours
    loaded, load = list[str](), lpvit_engines.load_engine

    def noted(*args: Any, precision: str = "default", **options: Any) -> Any:
        loaded.append(precision)
        return load(*args, precision=precision, **options)

    monkeypatch.setattr("lpvit_engines.load_engine", noted)
    allocation = files.load(Allocation, job.path("allocation.json"))
    assert steps.check(job, allocation, seconds=0.05).dense.accuracy is not None
    assert loaded == [precision] * 4  # dense and sparse, and the references to watch either


def test_a_check_in_another_precision_than_the_engine_to_deploy_is_made_again(
    finished: Job, tmp_path: Path
) -> None:
    job = copied(finished, tmp_path)
    before = files.load(Check, job.path("check.json"))
    assert before.precision == "float32"
    steps.build(job, precision="int8")
    for stale in (before, msgspec.structs.replace(before, precision=None)):  # as before format 3
        files.save(stale, job.path("check.json"))
        document = main_job.optimize(job, GOAL)
        after = files.load(Check, job.path("check.json"))
        assert after.precision == document["precision"] == "int8"
        assert document["profile_reasons"][-1].endswith("the engines ran in int8")
        assert document["dense"]["latency_ms"] == after.dense.latency.median_ms
        assert after.dense.latency.samples_ms != before.dense.latency.samples_ms


def test_weights_pruned_under_another_allocation_are_made_again(
    finished: Job, tmp_path: Path
) -> None:
    job = copied(finished, tmp_path)
    allocation = files.load(Allocation, job.path("allocation.json"))
    denser = [msgspec.structs.replace(c, sparsity=min(c.sparsity, 0.2)) for c in allocation.choices]
    changed = msgspec.structs.replace(allocation, choices=tuple(denser))
    files.save(changed, job.path("allocation.json"))
    with pytest.raises(MismatchError, match="pruned under another allocation"):
        steps.export(job, changed)
    before = files.load(Check, job.path("check.json"))
    main_job.optimize(job, GOAL)
    after = files.load(Check, job.path("check.json"))
    assert after.onnx_sha256 != before.onnx_sha256
    assert after.sparse.weight_bytes > before.sparse.weight_bytes


def test_the_document_has_the_promised_fields(finished: Job) -> None:
    document = load_document(finished.path("optimize.json"))
    assert document["schema"] == "lpvit.optimize/1"
    assert document["speedup"] == pytest.approx(
        document["dense"]["latency_ms"] / document["sparse"]["latency_ms"]
    )
    for side in ("dense", "sparse"):
        assert document[side]["latency_p99_ms"] >= document[side]["latency_ms"] > 0
        assert 0 <= document[side]["accuracy"] <= 1
        assert document[side]["images"] == 12
    assert document["accuracy_drop"] == pytest.approx(
        document["dense"]["accuracy"] - document["sparse"]["accuracy"]
    )
    assert document["predicted_latency_ms"] > 0
    assert document["rotated"] is True
    assert document["engine_relative_error"] <= 1e-3
    assert document["onnxruntime_relative_error"] <= 1e-3


def test_energy_without_a_sensor_is_none_with_a_reason_never_zero(finished: Job) -> None:
    dense = load_document(finished.path("optimize.json"))["dense"]
    if dense["energy_per_image_mj"] is None:
        assert dense["energy_quality"] == "unavailable"
        assert dense["energy_reason"]
    else:
        assert dense["energy_per_image_mj"] > 0


def test_the_report_is_one_file_without_links_to_others(finished: Job, tmp_path: Path) -> None:
    html = finished.path("report.html").read_text(encoding="utf-8")
    assert "src=" not in html
    assert "href=" not in html
    assert "blocks.0.mlp.fc1" in html
    document = load_document(finished.path("optimize.json"))
    document["model"]["name"] = "<script>alert(1)</script>"
    write_report(document, tmp_path / "r.html")
    assert "<script>" not in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_every_record_reads_back_as_it_was_written(finished: Job, tmp_path: Path) -> None:
    for kind, name in (
        (DeviceProfile, "device_profile.json"),
        (Allocation, "allocation.json"),
        (PruneLog, "prune.json"),
    ):
        files.save(files.load(kind, finished.path(name)), tmp_path / name)
        assert (tmp_path / name).read_bytes() == finished.path(name).read_bytes()


def test_resume_makes_only_what_is_missing(finished: Job, tmp_path: Path) -> None:
    job = copied(finished, tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in job.folder.iterdir()}
    for name in ("check.json", "optimize.json", "report.html"):
        job.path(name).unlink()
    run_folder.start(job, GOAL, resume=True, overwrite=False)
    main_job.optimize(job, GOAL)
    for name in ("device_profile.json", "sensitivity.json", "prune.json", "model.onnx"):
        assert job.path(name).stat().st_mtime_ns == before[name]
    assert job.path("report.html").exists()


def test_a_folder_with_a_run_is_not_overwritten_unasked(finished: Job) -> None:
    with pytest.raises(MismatchError, match=r"already holds a run .* --resume"):
        run_folder.start(finished, GOAL, resume=False, overwrite=False)


def test_resume_with_other_settings_names_the_difference(finished: Job, tmp_path: Path) -> None:
    job = copied(finished, tmp_path)
    other = msgspec.structs.replace(GOAL, target_latency="0.3x")
    with pytest.raises(MismatchError, match=r"target_latency was '50x', now '0.3x'"):
        run_folder.start(job, other, resume=True, overwrite=False)


def test_a_profile_of_another_machine_is_refused_by_name(finished: Job, tmp_path: Path) -> None:
    job = copied(finished, tmp_path)
    fields = json.loads(job.path("device_profile.json").read_text())
    fields["fingerprint"] = "0" * 64
    fields["device"]["cpu_model"] = "Pentium II"
    job.path("device_profile.json").write_text(json.dumps(fields))
    with pytest.raises(DeviceMismatchError, match=r"other conditions: .*Pentium II"):
        main_job.optimize(job, GOAL)


def test_a_profile_of_another_model_is_refused_by_name(finished: Job, tmp_path: Path) -> None:
    job = copied(finished, tmp_path)
    job.path("allocation.json").unlink()
    fields = json.loads(job.path("device_profile.json").read_text())
    fields["model"]["weights_sha256"] = "f" * 64
    job.path("device_profile.json").write_text(json.dumps(fields))
    with pytest.raises(MismatchError, match=r"of another model: weights_sha256 is 'ffff"):
        main_job.optimize(job, GOAL)


def test_curves_of_another_model_are_refused_by_name(finished: Job, tmp_path: Path) -> None:
    job = copied(finished, tmp_path)
    fields = json.loads(job.path("sensitivity.json").read_text())
    fields["model"]["weights_sha256"] = "f" * 64
    job.path("sensitivity.json").write_text(json.dumps(fields))
    with pytest.raises(MismatchError, match=r"sensitivity.json is of another model: weights_sha"):
        main_job.optimize(job, GOAL)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"kind": "check"}', "this is a 'check' file, expected 'device-profile'"),
        ('{"kind": "device-profile", "format": 9}', "format 9, this version reads formats 1 to 5"),
        ('{"kind": "device-profile", "format": 1}', "missing required field"),
    ],
)
def test_a_broken_record_is_refused_by_file_and_field(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(FileFormatError, match=message) as caught:
        files.load(DeviceProfile, tmp_path / "p.json")
    assert str(tmp_path / "p.json") in str(caught.value)


def test_a_budget_that_cannot_be_met_carries_the_best_that_can(
    finished: Job, tmp_path: Path
) -> None:
    job = copied(finished, tmp_path)
    job.path("allocation.json").unlink()
    goal = msgspec.structs.replace(GOAL, target_latency="0.001x", allocator="milp")
    with pytest.raises(BudgetNotMetError, match="ms is the best that is reachable"):
        main_job.optimize(job, goal)
    assert not job.path("allocation.json").exists()


def test_shared_images_between_the_sets_are_refused(tiny_project: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="calibration images are also held out"):
        make_job(tiny_project, tmp_path, heldout=tiny_project / "calibration")


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
def test_a_pattern_without_a_kernel_is_refused(
    tiny_project: Path, tmp_path: Path, pattern: str
) -> None:
    with pytest.raises(UnknownOptionError, match=f"--patterns '{pattern}'.* blocks such as 64x1"):
        make_job(tiny_project, tmp_path, patterns=("64x1", pattern))


def test_too_few_images_are_refused_before_anything_is_measured(
    tiny_project: Path, tmp_path: Path
) -> None:
    with pytest.raises(PruningError, match="use at least 16 images"):
        make_job(tiny_project, tmp_path, images=3)


def test_images_all_alike_are_refused_before_anything_is_measured(
    tiny_project: Path, tmp_path: Path
) -> None:
    found = sorted((tiny_project / "calibration").rglob("*.png"))[0]
    (tmp_path / "same").mkdir()
    for number in range(24):
        shutil.copy(found, tmp_path / "same" / f"{number}.png")
    with pytest.raises(DataError, match="all 24 images are alike"):
        make_job(tiny_project, tmp_path, calibration=tmp_path / "same")


def test_without_labels_the_heldout_classes_order_both_sets(
    tiny_project: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(tiny_project, project)
    text = (project / "model.toml").read_text()
    (project / "model.toml").write_text(text.replace('labels = ["bright", "dark", "ok"]', ""))
    shutil.rmtree(project / "calibration/bright")
    job = make_job(project, tmp_path / "run", images=16)
    assert set(job.calibration.targets or ()) == {1, 2}


def test_labels_that_do_not_match_the_outputs_are_refused(
    tiny_project: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(tiny_project, project)
    text = (project / "model.toml").read_text()
    (project / "model.toml").write_text(text.replace('"ok"]', '"ok", "torn"]'))
    with pytest.raises(DataError, match="the model has 3 outputs but there are 4 classes"):
        make_job(project, tmp_path / "run")


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(tmp_path / "a.json", b"new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "old")]
