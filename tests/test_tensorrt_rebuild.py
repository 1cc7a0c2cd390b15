"""A plan of another device is built again from the ONNX file while the old engine goes on."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx.shape_inference import infer_shapes

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import DeviceMismatchError, EngineError, FileFormatError, MismatchError
from lpvit_edge.golden import Agreement
from lpvit_edge.onnx_nodes import repeated_layer_model
from lpvit_edge.proof import refuse_disagreement
from lpvit_engines import Engine, load_engine
from lpvit_engines.tensorrt import ahead_of_time, making, plan_file
from lpvit_engines.tensorrt.device import opened
from lpvit_engines.tensorrt.engine import TensorRtEngine
from lpvit_engines.tensorrt.kept import MadePlan
from lpvit_engines.tensorrt.making import make_plan
from lpvit_engines.tensorrt.sparsity import LayerProof
from tests.cuda.runtime_driver import Driver
from tests.test_tensorrt_build import files_of
from tests.test_tensorrt_int8 import block_layer, two_four_layer
from tests.trt.fake_builder import building_tensorrt
from tests.trt.served import (
    ORIN,
    compute,
    images,
    manifest_of,
    write_plan,
)

UPGRADED = msgspec.structs.replace(ORIN, tensorrt="10.16.2")


def test_the_old_engine_serves_until_the_new_plan_is_swapped_in(
    driver: Driver, trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = write_plan(tmp_path)
    before = files_of(tmp_path)
    old = TensorRtEngine(onnx, library=driver.path)
    x = images()
    answer = compute({"x": x})["logits"]
    trt.__version__ = "10.16.2"

    def build_plan(
        path: Path, device: object, *, proven: bool, precision: str, python_free: bool
    ) -> MadePlan:
        assert (proven, precision, python_free) == (True, "float16", False)
        assert old.infer(x) == pytest.approx(answer, abs=1e-5)
        content = b"plan of the upgraded device"
        return MadePlan(plan=content, manifest=manifest_of(path, device=UPGRADED, content=content))

    def accept(candidate: object) -> None:
        assert files_of(tmp_path) == before
        assert old.infer(x) == pytest.approx(answer, abs=1e-5)

    monkeypatch.setattr("lpvit_engines.tensorrt.engine.build_plan", build_plan)
    with TensorRtEngine(onnx, rebuild=True, accept=accept, library=driver.path) as new:
        assert new.manifest.device == UPGRADED
        assert old.infer(x) == pytest.approx(answer, abs=1e-5)
    old.close()
    assert driver.live == 0
    (plan,) = tmp_path.glob("*.plan")
    assert plan.read_bytes() == b"plan of the upgraded device"


def test_a_rebuild_that_fails_leaves_the_old_plan_as_it_was(
    driver: Driver, trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = write_plan(tmp_path)
    before = files_of(tmp_path)
    trt.__version__ = "10.16.2"

    def build_plan(*_: object, **__: object) -> None:
        raise EngineError("TensorRT built no engine")

    monkeypatch.setattr("lpvit_engines.tensorrt.engine.build_plan", build_plan)
    with pytest.raises(EngineError, match="built no engine"):
        TensorRtEngine(onnx, rebuild=True, library=driver.path)
    assert files_of(tmp_path) == before
    with pytest.raises(DeviceMismatchError, match=r"tensorrt is 10\.3\.0 there .* --rebuild"):
        TensorRtEngine(onnx, library=driver.path)
    assert driver.live == 0


@pytest.fixture
def building(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Any, Path, NDArray[np.float32]]:
    """(a TensorRT that builds, an ONNX file with a 2:4 layer and a plan of an older TensorRT, x)"""
    module = building_tensorrt(driver=driver)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    onnx = tmp_path / "bundle/model.onnx"
    onnx.parent.mkdir()
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((64, 64)).astype(np.float32)
    weight.reshape(64, 16, 4)[:, :, 2:] = 0
    model = repeated_layer_model(
        tokens=5, in_features=64, out_features=64, activation="none", copies=[weight]
    )
    onnx.write_bytes(infer_shapes(model).SerializeToString())  # as an exported file has them
    TensorRtEngine(onnx, library=driver.path).close()
    module.__version__ = "10.16.2"
    return module, onnx, generator.standard_normal((1, 5, 64)).astype(np.float32)


def test_a_rebuild_times_every_sparse_layer_against_its_dense_twin(
    driver: Driver, building: tuple[Any, Path, NDArray[np.float32]]
) -> None:
    module, onnx, x = building
    before = plan_file.read_manifest(plan_file.manifest_path(onnx))
    assert before.proofs is None  # loading alone compares nothing, and says so
    builds = len(module.configs)
    seen: list[NDArray[np.float32]] = []
    with TensorRtEngine(
        onnx, rebuild=True, accept=lambda engine: seen.append(engine.infer(x)), library=driver.path
    ) as engine:
        assert np.array_equal(engine.infer(x), seen[0])
    after = plan_file.read_manifest(plan_file.manifest_path(onnx))
    assert after.device.tensorrt == "10.16.2"
    assert after.proofs is not None
    assert [proof.pattern for proof in after.proofs] == ["2:4"]
    assert len(module.configs) == builds + 3  # the layer sparse, dense, and the whole network


def test_a_rebuild_keeps_the_kernels_in_the_plan_where_they_were(
    driver: Driver,
    building: tuple[Any, Path, NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, onnx, _ = building
    forms: list[str] = []
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: forms.append("py"))
    monkeypatch.setattr(ahead_of_time, "register", lambda trt: forms.append("ptx"))

    def rebuilt(version: str) -> tuple[bool, set[str]]:
        forms.clear()
        module.__version__ = version
        with TensorRtEngine(onnx, rebuild=True, library=driver.path) as engine:
            return engine.manifest.python_free, set(forms)

    module.__version__ = "10.13.3"
    onnx.write_bytes(block_layer().SerializeToString())
    with opened(driver.path) as device, device.calls.current(device.context):
        monkeypatch.setattr(making, "prove", kept_sparse)
        make_plan(onnx, device, proven=True, python_free=True)
    assert rebuilt("10.16.2") == (True, {"ptx"})
    assert rebuilt("10.3.0") == (False, {"py"})  # JetPack 6 again
    assert "10.3.0 cannot make such a one, and the new one calls Python" in caplog.text
    onnx.write_bytes(two_four_layer().SerializeToString())
    assert rebuilt("10.16.2") == (True, set())  # nothing in it is a plugin: neither form binds it
    assert rebuilt("10.3.1") == (True, set())


def kept_sparse(portable: object, layer: str, pattern: str, **_: object) -> LayerProof:
    return LayerProof(
        layer=layer, pattern=pattern, dense_ms=2.0, sparse_ms=1.0, kernel="k", kept=True
    )


def test_a_rebuild_takes_a_damaged_plan_for_none(
    driver: Driver, building: tuple[Any, Path, NDArray[np.float32]], tmp_path: Path
) -> None:
    module, onnx, x = building
    module.__version__ = "10.3.0"
    (plan,) = onnx.parent.glob("*.plan")
    plan.write_bytes(b"half of it")
    with pytest.raises(FileFormatError, match=r"is not the plan that model\.plan\.json describes"):
        TensorRtEngine(onnx, library=driver.path)
    TensorRtEngine(onnx, rebuild=True, library=driver.path).close()
    plan_file.manifest_path(onnx).write_text('{"kind": "tensorrt-plan", "format": 99}')
    with TensorRtEngine(onnx, rebuild=True, library=driver.path) as engine:
        assert engine.infer(x).shape == (1, 1, 1)
    assert len(list(onnx.parent.glob("*.plan"))) == 1
    assert driver.live == 0


def test_a_rebuilt_engine_that_answers_otherwise_is_not_put_in_place(
    driver: Driver, building: tuple[Any, Path, NDArray[np.float32]]
) -> None:
    module, onnx, x = building
    before = files_of(onnx.parent)
    module.__version__ = "10.3.0"
    old = TensorRtEngine(onnx, library=driver.path)
    live = driver.live
    module.__version__ = "10.16.2"
    answers: list[NDArray[np.float32]] = []

    def accept(engine: Engine) -> None:
        answers.append(engine.infer(x))
        refuse_disagreement(Agreement(frames=16, same_class=9, worst=0.4))

    with pytest.raises(
        MismatchError, match=r"is not put in place, .* stays as it is: 9 of 16 golden frames"
    ):
        TensorRtEngine(onnx, rebuild=True, accept=accept, library=driver.path)
    assert files_of(onnx.parent) == before
    assert driver.live == live
    assert old.infer(x) == pytest.approx(answers[0], rel=0.01)
    old.close()
    assert driver.live == 0


def test_a_bundles_golden_frames_judge_what_is_built_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpvit_edge import proof

    given: list[Any] = []
    monkeypatch.setattr("lpvit_engines.load_engine", lambda *_, **o: given.append(o["accept"]))
    monkeypatch.setattr(proof, "unpack", lambda path: ())
    wrong = Agreement(frames=16, same_class=15, worst=0.2)
    monkeypatch.setattr(proof, "agreement", lambda *_: wrong)
    manifest: Any = SimpleNamespace(engine="tensorrt", threads=1, precision="float16")
    record: Any = SimpleNamespace(preprocess=None)
    proof.load_bundle_engine(Bundle(folder=tmp_path, record=record, manifest=manifest))
    with pytest.raises(MismatchError, match="15 of 16 golden frames"):
        given[0](None)


def test_engines_that_compile_at_each_load_take_rebuild_as_given(tmp_path: Path) -> None:
    path = tmp_path / "absent.onnx"
    with pytest.raises(EngineError, match="no model file"):
        load_engine("openvino", path, rebuild=True)


def test_the_option_of_the_verbs_reaches_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpvit_edge.line import bundles
    from lpvit_edge.proof import load_bundle_engine

    def refuse(bundle: object) -> None:
        raise DeviceMismatchError("built elsewhere")

    given: list[Any] = []
    manifest: Any = SimpleNamespace(engine="tensorrt", threads=1, precision="float16")
    record: Any = SimpleNamespace()
    bundle = Bundle(folder=tmp_path, record=record, manifest=manifest)
    monkeypatch.setattr(bundles, "open_bundle", lambda folder: bundle)
    monkeypatch.setattr(bundles, "refuse_other_device", refuse)
    monkeypatch.setattr("lpvit_engines.load_engine", lambda *_, **o: given.append(o["rebuild"]))
    load_bundle_engine(bundles.OneBundle(tmp_path, rebuild=True).begin())
    load_bundle_engine(bundles.OneBundle(tmp_path, other_device=True).begin())
    assert given == [True, False]
    with pytest.raises(DeviceMismatchError):
        bundles.OneBundle(tmp_path).begin()
