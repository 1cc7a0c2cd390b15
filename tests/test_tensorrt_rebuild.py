"""A plan of another device is built again from the ONNX file while the old engine goes on."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import DeviceMismatchError, EngineError
from lpvit_engines import load_engine
from lpvit_engines.tensorrt import plan_file
from lpvit_engines.tensorrt.engine import TensorRtEngine
from tests.cuda.fake_driver import compile_fake_driver
from tests.test_tensorrt_engine import ORIN, SHAPES, Driver, compute, images, write_plan
from tests.trt.fake_trt import fake_tensorrt

UPGRADED = msgspec.structs.replace(ORIN, tensorrt="10.16.2")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_driver(tmp_path_factory.mktemp("driver"), source="fake_runtime.c")


@pytest.fixture
def driver(library: Path) -> Driver:
    return Driver(library)


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_tensorrt(SHAPES, compute)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
    return module


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_old_engine_serves_until_the_new_plan_is_swapped_in(
    driver: Driver, trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = write_plan(tmp_path)
    before = files_of(tmp_path)
    old = TensorRtEngine(onnx, library=driver.path)
    old._loaded.session._executable = None  # type: ignore[union-attr]  # a fake graph computes nothing
    x = images()
    answer = compute({"x": x})["logits"]
    trt.__version__ = "10.16.2"

    def make_plan(path: Path, device: object, *, proven: bool) -> None:
        assert files_of(tmp_path) == before
        assert old.infer(x) == pytest.approx(answer, abs=1e-5)
        write_plan(tmp_path, device=UPGRADED, content=b"plan of the upgraded device")

    monkeypatch.setattr("lpvit_engines.tensorrt.engine.make_plan", make_plan)
    with TensorRtEngine(onnx, rebuild=True, library=driver.path) as new:
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

    def make_plan(*_: object, **__: object) -> None:
        raise EngineError("TensorRT built no engine")

    monkeypatch.setattr("lpvit_engines.tensorrt.engine.make_plan", make_plan)
    with pytest.raises(EngineError, match="built no engine"):
        TensorRtEngine(onnx, rebuild=True, library=driver.path)
    assert files_of(tmp_path) == before
    with pytest.raises(DeviceMismatchError, match=r"tensorrt is 10\.3\.0 there .* --rebuild"):
        TensorRtEngine(onnx, library=driver.path)
    assert driver.live == 0


def test_a_swap_cut_off_at_any_write_leaves_a_whole_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = write_plan(tmp_path)
    real = plan_file._write_atomic

    def cut_off(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(plan_file, "_write_atomic", cut_off)
    with pytest.raises(OSError, match="No space"):
        write_plan(tmp_path, device=UPGRADED, content=b"plan, newer")
    found = plan_file.read(onnx, ORIN)
    assert found is not None
    assert found[0] == b"plan of a model"
    monkeypatch.undo()
    write_plan(tmp_path, device=UPGRADED, content=b"plan, newest")
    assert len(list(tmp_path.glob("*.plan"))) == 1  # what was cut off is gone too


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
