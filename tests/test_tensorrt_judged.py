"""A plan is put in place once its answers are those of another runtime."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

from lpvit_edge.errors import EngineError, WrongAnswersError
from lpvit_edge.tensorrt_build import build_file, build_proven
from lpvit_engines.tensorrt import plan_file
from lpvit_engines.tensorrt.plan_file import Compared
from lpvit_engines.tensorrt.rounding import LARGEST_INT8, int8_tolerance
from tests.test_tensorrt_build import accepted, files_of
from tests.test_tensorrt_int8 import calibrated, two_four_layer


@pytest.fixture
def trt(trt_that_builds: Any) -> Any:
    return trt_that_builds


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file of one 2:4 layer, in a folder of its own."""
    (tmp_path / "here").mkdir()
    return calibrated(tmp_path / "here", two_four_layer())


def refuse_with(error: EngineError) -> Any:
    def refuse(_: Any) -> Compared:
        raise error

    return refuse


def test_a_plan_that_could_not_be_asked_stays(trt: Any, model: Path) -> None:
    build_proven(model, judge=accepted)
    before = files_of(model.parent)
    words = r"out of device memory\. The plan beside it stays; delete .*model\.plan\.json"
    with pytest.raises(EngineError, match=words):
        build_proven(model, judge=refuse_with(EngineError("out of device memory")))
    assert files_of(model.parent) == before
    plan_file.discard(model)
    with pytest.raises(EngineError, match=r"out of device memory$"):
        build_proven(model, judge=refuse_with(EngineError("out of device memory")))
    assert not list(model.parent.glob("*.plan*"))


def test_a_plan_lies_nowhere_until_its_answers_were_taken(trt: Any, model: Path) -> None:
    before = files_of(model.parent)

    def refuse(answer: Any) -> Compared:
        assert np.isfinite(answer(np.zeros((1, 5, 64), np.float32))).all()
        assert files_of(model.parent) == before
        raise WrongAnswersError("tensorrt differs from the torch model")

    with pytest.raises(WrongAnswersError, match="differs from the torch model"):
        build_proven(model, judge=refuse)
    assert files_of(model.parent) == before
    kept = build_proven(model, judge=accepted)
    assert plan_file.read_manifest(plan_file.manifest_path(model)) == kept
    assert kept.compared == accepted(None)
    with pytest.raises(WrongAnswersError):  # one that was taken before and now is not goes
        build_proven(model, judge=refuse_with(WrongAnswersError("other answers")))
    assert not list(model.parent.glob("*.plan*"))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_file_alone_is_held_against_itself_by_onnx_runtime(
    trt: Any, model: Path, precision: str
) -> None:
    said = build_file(model, engine="tensorrt", precision=precision, python_free=False)
    assert "its answers differ from onnxruntime's by" in said
    name = {"fp16": "float16"}.get(precision, precision)
    found = plan_file.read_manifest(plan_file.manifest_path(model, name)).compared
    assert found is not None
    assert found.error <= found.tolerance <= LARGEST_INT8
    builds = len(trt.configs)
    build_file(model, engine="tensorrt", precision=precision, python_free=False)
    assert len(trt.configs) == builds  # built and judged once


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_engine_that_answers_nothing_is_refused_by_a_file_alone(
    trt: Any, model: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    def zeros(_: Any, inputs: set[str]) -> Any:
        return lambda arrays: {name: 0.0 for name in arrays if name not in inputs}

    monkeypatch.setattr("tests.trt.fake_builder._computing", zeros)
    with pytest.raises(WrongAnswersError, match=r"tensorrt differs from onnxruntime by 1\.00e\+00"):
        build_file(model, engine="tensorrt", precision=precision, python_free=False)
    assert not list(model.parent.glob("*.plan*"))


def test_without_another_runtime_it_is_said_that_nothing_was_compared(
    trt: Any, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def built() -> str:
        return build_file(model, engine="tensorrt", precision="fp16", python_free=False)

    onnxruntime = sys.modules["onnxruntime"]
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "differ from openvino's by" in built()
    plan_file.discard(model)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert built().endswith("its answers were compared with nothing here")
    said = capsys.readouterr().err
    assert "compared with nothing: cannot import onnxruntime" in said
    assert "To have them compared: pip install onnxruntime, then run this again" in said
    monkeypatch.setitem(sys.modules, "onnxruntime", onnxruntime)
    builds = len(trt.configs)
    assert "differ from onnxruntime's by" in built()  # the plan that is there
    assert len(trt.configs) == builds


def test_an_int8_that_is_coarse_does_not_excuse_a_wrong_engine() -> None:
    assert int8_tolerance(0.01, 0.02) == pytest.approx(0.05)
    assert int8_tolerance(0.01, 5.0) == LARGEST_INT8 < 1.0  # what zeros are off by


def test_a_manifest_of_the_format_before_still_reads(trt: Any, model: Path) -> None:
    build_proven(model, judge=accepted)
    beside = plan_file.manifest_path(model)
    fields = msgspec.json.decode(beside.read_bytes())
    for name in ("attention", "gpu_clocks", "compared"):
        fields.pop(name, None)
    for proof in fields["proofs"]:
        proof.pop("memory_skips", None)
    beside.write_bytes(msgspec.json.encode({**fields, "format": 3}))
    old = plan_file.read_manifest(beside)
    assert (old.attention, old.compared) == (None, None)
    builds = len(trt.configs)
    assert build_proven(model, judge=accepted).compared == accepted(None)  # judged, not built
    assert len(trt.configs) == builds


def test_a_file_that_the_engine_cannot_take_is_refused_before_it_is_built(
    trt: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.onnx").write_text("not a network at all")
    two = two_four_layer()
    two.graph.input.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1]))
    (tmp_path / "two.onnx").write_bytes(two.SerializeToString())
    for name, words in (("text", "is not an ONNX file"), ("two", r"'z'\]; this engine takes")):
        with pytest.raises(EngineError, match=words):
            build_proven(tmp_path / f"{name}.onnx")
    assert not trt.configs
