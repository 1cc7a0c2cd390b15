"""One contract for every engine, the fake included."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from lpvit_edge.errors import EngineError, UnknownEngineError
from lpvit_engines import Engine, engine_names, load_engine
from lpvit_engines.tensorrt.device import opened
from tests.cuda.fake_driver import compile_fake_driver
from tests.cuda.runtime_driver import Driver
from tests.native.onnx_models import dense_model
from tests.trt.fake_builder import building_tensorrt


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return dense_model(tmp_path / "dense.onnx", features=True)


def stand_in_for_tensorrt(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A fake driver and a TensorRT whose engines ONNX Runtime computes."""
    driver = Driver(compile_fake_driver(folder, source="fake_runtime.c"))
    monkeypatch.setitem(sys.modules, "tensorrt", building_tensorrt(driver=driver))
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
    monkeypatch.setattr("lpvit_engines.tensorrt.engine.opened", lambda _: opened(driver.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


@pytest.fixture(params=engine_names())
def engine(
    request: pytest.FixtureRequest,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    if request.param == "tensorrt" and find_spec("tensorrt") is None:
        stand_in_for_tensorrt(monkeypatch, tmp_path)
    with load_engine(request.param, model, threads=1) as loaded:
        assert loaded.name == request.param
        yield loaded


def test_an_engine_gives_one_row_per_image_and_gives_it_away(engine: Engine) -> None:
    x = np.zeros(engine.input_shape, np.float32)
    first = engine.infer(x)
    assert first.dtype == np.float32
    assert first.shape[0] == engine.input_shape[0]
    kept = first.copy()
    second = engine.infer(x + 1)
    assert np.array_equal(first, kept)
    assert not np.array_equal(first, second)


def test_an_engine_gives_every_output_by_name_and_the_answer_first(engine: Engine) -> None:
    x = np.random.default_rng(0).standard_normal(engine.input_shape).astype(np.float32)
    found = engine.infer_all(x)
    assert tuple(found) == engine.outputs == ("logits", "features")
    assert np.array_equal(found["logits"], engine.infer(x))
    rounding = 1e-3 if engine.name == "tensorrt" else 1e-6  # float16, float32
    assert found["features"] == pytest.approx(x.mean(axis=(2, 3)), abs=rounding)
    kept = found["features"].copy()
    engine.infer_all(x + 1)
    assert np.array_equal(found["features"], kept)


def test_an_engine_names_its_kernels(engine: Engine) -> None:
    kernels = engine.kernels()
    assert kernels
    assert all(isinstance(name, str) and kernel for name, kernel in kernels.items())


def test_an_engine_refuses_another_shape(engine: Engine) -> None:
    with pytest.raises(EngineError, match=r"the input has shape \(7,\); this model was compiled"):
        engine.infer(np.zeros(7, np.float32))


def test_an_engine_refuses_another_dtype(engine: Engine) -> None:
    with pytest.raises(EngineError, match="the input is float64; convert it"):
        engine.infer(np.zeros(engine.input_shape))  # type: ignore[arg-type]


def test_a_closed_engine_says_so_and_closes_twice(engine: Engine) -> None:
    engine.close()
    engine.close()
    for infer in (engine.infer, engine.infer_all):
        with pytest.raises(EngineError, match="this engine is closed"):
            infer(np.zeros(engine.input_shape, np.float32))


@pytest.mark.parametrize("name", engine_names())
def test_a_missing_model_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no model file .*absent\.onnx"):
        load_engine(name, tmp_path / "absent.onnx")


def test_an_unknown_engine_lists_the_known_ones(model: Path) -> None:
    with pytest.raises(UnknownEngineError, match="no engine 'tvm'; there are: fake, openvino"):
        load_engine("tvm", model)


def test_no_threads_are_refused(model: Path) -> None:
    with pytest.raises(EngineError, match="threads is 0; give 1 or more"):
        load_engine("fake", model, threads=0)
