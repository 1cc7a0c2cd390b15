"""The whole way to a TensorRT engine, on a fake driver and a fake TensorRT that builds."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("timm")

from lpvit_edge import files, prune_step, run_folder, steps
from lpvit_edge import optimize as main_job
from lpvit_edge.bundle import Bundle, open_bundle
from lpvit_edge.cli import app
from lpvit_edge.dense_bundle import dense_bundle
from lpvit_edge.device_profile import profile_device
from lpvit_edge.errors import (
    DeviceMismatchError,
    EngineError,
    MismatchError,
    MissingDependencyError,
    UnknownOptionError,
)
from lpvit_edge.job import Job
from lpvit_edge.proof import proven_engine
from lpvit_edge.records import Allocation, Choice, ExportLog, Manifest
from lpvit_edge.store import BundleStore
from lpvit_engines.cuda.packing import pack
from lpvit_engines.tensorrt import plan_file, trials
from lpvit_engines.tensorrt.engine import TensorRtEngine
from tests.test_optimize import GOAL, costlier, make_job


@pytest.fixture
def trt(trt_that_builds: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("lpvit_edge.profile.engine_version", lambda engine: "10.3.0")
    monkeypatch.setattr("lpvit_edge.profile.DEFAULT_SECONDS", 0.02)
    return trt_that_builds


def test_optimize_walks_from_the_profile_to_a_checked_engine(
    trt: Any, tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tiny_project, tmp_path / "run", engine="tensorrt", patterns=("2:4",))
    goal = msgspec.structs.replace(GOAL, curve=False)
    run_folder.start(job, goal, resume=False, overwrite=False)
    profile = profile_device(job, network_seconds=0.02)
    files.save(costlier(profile), job.path("device_profile.json"))
    built: list[str] = []
    write = plan_file.write

    def noted(onnx: Path, plan: bytes, manifest: Any) -> None:
        built.append(onnx.name)
        write(onnx, plan, manifest)

    monkeypatch.setattr(plan_file, "write", noted)
    document = main_job.optimize(job, goal)
    assert document["schema"].startswith("lpvit.optimize/")
    exported = files.load(ExportLog, job.path("export.json"))
    assert exported.engine_tolerance is not None
    assert exported.tolerance < exported.engine_tolerance < 0.02  # float32's, then float16's
    assert 0.0 < exported.engine_error < exported.engine_tolerance
    assert built.count("model.onnx") == 1  # `build` takes the engine that `export` proved
    manifest = files.load(Manifest, job.path("manifest.json"))
    assert (manifest.engine, manifest.precision) == ("tensorrt", "float16")
    plan = plan_file.read_manifest(job.path("model.plan.json"))
    assert plan.onnx_sha256 == exported.onnx_sha256
    assert plan.proofs
    assert {proof.pattern for proof in plan.proofs} == {"2:4"}
    assert job.path("report.html").is_file()
    builds = len(trt.configs)
    install_dense(job.folder, tmp_path / "store")
    assert len(trt.configs) == builds  # `check` left its plan beside dense.onnx


def install_dense(run: Path, store: Path) -> Bundle:
    with dense_bundle(run) as folder:
        return BundleStore(store).install(
            folder, lambda copy: proven_engine(copy).close(), role="dense"
        )


def test_block_sparse_layers_go_from_the_weights_to_a_bundle_that_is_built_again(
    trt: Any, tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin's product is computed from the weights that were packed for the kernel."""
    monkeypatch.setattr(trials, "alternating", lambda _: {"sparse": [1.0], "dense": [2.0]})
    job = make_job(tiny_project, tmp_path / "run", engine="tensorrt", patterns=("64x16",))
    goal = msgspec.structs.replace(GOAL, curve=False)
    run_folder.start(job, goal, resume=False, overwrite=False)
    files.save(costlier(profile_device(job, network_seconds=0.02)), job.path("device_profile.json"))
    main_job.optimize(job, goal)
    exported = files.load(ExportLog, job.path("export.json"))
    assert exported.engine_tolerance is not None
    assert 0.0 < exported.engine_error < exported.engine_tolerance < 0.02
    plan = plan_file.read_manifest(job.path("model.plan.json"))
    assert plan.proofs
    assert {(p.pattern, p.kept, p.kernel) for p in plan.proofs} == {
        ("64x16", True, "BlockSparseLinear")
    }
    assert not plan.python_free
    bundle = open_bundle(job.folder)
    trt.__version__ = "10.16.2"
    with pytest.raises(DeviceMismatchError, match=r"tensorrt is 10\.3\.0 there and 10\.16\.2 here"):
        proven_engine(bundle)
    with proven_engine(msgspec.structs.replace(bundle, rebuild=True)) as engine:
        assert isinstance(engine, TensorRtEngine)
        assert engine.manifest.device.tensorrt == "10.16.2"
        assert [proof.kept for proof in engine.manifest.proofs or ()] == [True] * len(plan.proofs)
    proven_engine(bundle).close()


def test_packed_weights_that_are_wrong_are_refused(
    trt: Any, tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block column too far, as a kernel would read it."""
    monkeypatch.setattr(trials, "alternating", lambda _: {"sparse": [1.0], "dense": [2.0]})
    job = make_job(tiny_project, tmp_path / "run", engine="tensorrt", patterns=("64x16",))
    allocation = one_layer("64x16", job)
    files.save(allocation, job.path("allocation.json"))
    steps.export_model(job, job.model.module, {}, job.path("dense.onnx"))
    prune_step.prune(job, allocation)

    def shifted(*given: Any, **options: Any) -> Any:
        packed = pack(*given, **options)
        return replace(packed, columns=(packed.columns + 16) % packed.in_features)

    monkeypatch.setattr("lpvit_engines.tensorrt.onnx_copy.pack", shifted)
    with pytest.raises(EngineError, match="tensorrt differs from the torch model by"):
        steps.export(job, allocation)
    assert not job.path("model.plan.json").exists()


def one_layer(pattern: str, job: Job) -> Allocation:
    return Allocation(
        model=job.model.identity,
        fingerprint="00",
        criterion="hessian",
        allocator="uniform",
        budget={},
        choices=(
            Choice(
                layer="blocks.0.mlp.fc1",
                pattern=pattern,
                sparsity=0.5,
                latency_ms=1.0,
                dense_latency_ms=1.0,
                distortion=0.0,
            ),
        ),
        predicted_latency_ms=1.0,
        predicted_dense_ms=1.0,
        distortion=0.0,
        bound=(),
    )


def test_a_bundle_in_int8_is_calibrated_built_once_and_checked(
    trt: Any, tiny_project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job(tiny_project, tmp_path / "run", engine="tensorrt", patterns=("2:4",))
    allocation = one_layer("2:4", job)
    files.save(allocation, job.path("allocation.json"))
    steps.export_model(job, job.model.module, {}, job.path("dense.onnx"))
    prune_step.prune(job, allocation)
    log = steps.export(job, allocation, precision="int8")
    assert log.engine_tolerance is not None
    assert 0.0 < log.engine_error < log.engine_tolerance < 0.2
    builds = len(trt.configs)
    manifest = steps.build(job, precision="int8")
    assert "predicted times are float16's" in capsys.readouterr().err
    assert len(trt.configs) == builds
    assert manifest.precision == "int8"
    bundle = open_bundle(job.folder)
    assert "model.int8.json" in bundle.record.sha256
    with proven_engine(bundle) as engine:
        assert isinstance(engine, TensorRtEngine)
        assert engine.manifest.int8_layers
    checked = steps.check(job, allocation, seconds=0.05)
    assert 0.0 <= checked.agreement <= 1.0  # dense.onnx and model.onnx, both in int8
    assert job.path("dense.int8.plan.json").is_file()
    builds = len(trt.configs)
    dense = install_dense(job.folder, tmp_path / "store")
    assert len(trt.configs) == builds
    assert dense.path("model.int8.plan.json").is_file()
    job.path("model.int8.json").write_text("{}")
    with pytest.raises(MismatchError, match=r"model\.int8\.json: its content changed"):
        open_bundle(job.folder)


def test_a_device_without_torch_builds_the_exported_file(trt: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tests.test_tensorrt_int8 import calibrated, two_four_layer

    path = calibrated(tmp_path, two_four_layer())
    for precision in ("fp16", "int8"):
        given = ["build", str(path), "--engine", "tensorrt", "--precision", precision]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.exception
        name = plan_file.DEFAULT_PRECISION if precision == "fp16" else precision
        plan = plan_file.read_manifest(plan_file.manifest_path(path, name))
        said = plan_file.plan_path(path, plan.plan_sha256, name)
        assert f"{said}: {name}, " in result.stdout.replace("\n", "")
        assert "of 1 sparse layers run sparse" in result.stdout
    for engine, error, words in (
        ("openvino", UnknownOptionError, "compiles model.onnx whenever it loads it"),
        ("tensorrt", EngineError, "no model file"),
    ):
        file = path if engine == "openvino" else tmp_path / "absent.onnx"
        result = CliRunner().invoke(app, ["build", str(file), "--engine", engine])
        assert isinstance(result.exception, error)
        assert words in str(result.exception)


@pytest.mark.skipif("tensorrt" in sys.modules, reason="TensorRT is here")
def test_without_tensorrt_the_verb_says_so_in_words(
    tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = CliRunner().invoke(
        app,
        ["optimize", str(tiny_project / "model.toml"), "--engine", "tensorrt", "--images", "24",
         "--out", str(tmp_path / "run")],
    )  # fmt: skip
    assert isinstance(result.exception, MissingDependencyError)
    assert result.exception.exit_code == 3
    assert "it comes with JetPack; make the venv with --system-site-packages" in str(
        result.exception
    )
