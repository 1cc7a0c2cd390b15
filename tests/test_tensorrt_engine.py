"""The run time on a fake CUDA driver and a fake TensorRT: every driver call, in order, and every
failure."""

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from lpvit_edge.errors import (
    DeviceMismatchError,
    EngineError,
    EnvironmentUnfitError,
    LpvitEdgeError,
)
from lpvit_engines.tensorrt import plan_file
from lpvit_engines.tensorrt.device import opened
from lpvit_engines.tensorrt.engine import TensorRtEngine
from lpvit_engines.tensorrt.plan_file import DeviceKey
from lpvit_engines.tensorrt.plugin import kernel_for
from tests.cuda.runtime_driver import Driver
from tests.trt.served import ORIN, SHAPES, compute, images, write_plan

X_BYTES, LOGITS_BYTES, FEATURES_BYTES = 4 * 96, 4 * 10, 4 * 6


def test_it_answers_by_name_and_gives_its_arrays_away(engine: TensorRtEngine, trt: Any) -> None:
    x = images()
    found = engine.infer_all(x)
    expected = compute({"x": x})
    assert tuple(found) == engine.outputs == ("logits", "features")
    assert engine.output_shapes == {name: SHAPES[name] for name in engine.outputs}
    assert found["logits"] == pytest.approx(expected["logits"], abs=1e-5)
    assert np.array_equal(found["logits"], engine.infer(x))
    kept = found["features"].copy()
    engine.infer_all(x + 1)
    assert np.array_equal(found["features"], kept)
    assert engine.kernels() == {"head + softmax": "sm80_gemm"}


def test_loading_captures_one_graph_after_a_warm_run(
    driver: Driver, engine: TensorRtEngine, trt: Any
) -> None:
    names = driver.names
    warm, begin = names.index("cuStreamSynchronize"), names.index("cuStreamBeginCapture")
    assert warm < begin
    assert names[begin : begin + 4] == [
        "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy",
    ]  # fmt: skip
    stream = trt.contexts[0].streams
    assert len(stream) == 2
    assert len(set(stream)) == 1
    assert f"cuStreamBeginCapture({stream[0]:#x}, 1)" in driver.calls
    hosts = [call for call in driver.calls if call.startswith("cuMemHostAlloc")]
    assert hosts == [f"cuMemHostAlloc({n}, 2)" for n in (X_BYTES, LOGITS_BYTES, FEATURES_BYTES)]


def test_a_run_copies_launches_the_graph_copies_back_and_waits_once(
    driver: Driver, engine: TensorRtEngine, trt: Any
) -> None:
    driver.forget()
    engine.infer(images())
    stream = trt.contexts[0].streams[0]
    assert driver.calls[0] == "cuCtxPushCurrent(0xc0)"
    assert driver.calls[1] == f"cuMemcpyHtoDAsync({X_BYTES}, {stream:#x})"
    assert driver.calls[2].startswith("cuGraphLaunch(")
    assert driver.calls[3:] == [
        f"cuMemcpyDtoHAsync({LOGITS_BYTES}, {stream:#x})",
        f"cuMemcpyDtoHAsync({FEATURES_BYTES}, {stream:#x})",
        f"cuStreamSynchronize({stream:#x})",
        "cuCtxPopCurrent()",
    ]


def test_event_times_say_how_they_were_taken(driver: Driver, engine: TensorRtEngine) -> None:
    driver.forget()
    (whole,) = engine.event_times(images(), runs=1)
    assert whole.modes.cuda_graph
    assert whole.modes.spin_wait
    assert whole.modes.data_transfers
    assert whole.to_device_ms is not None
    order = [name for name in driver.names if name in ("cuEventRecord", "cuGraphLaunch")]
    assert order[1:] == ["cuEventRecord"] * 2 + ["cuGraphLaunch"] + ["cuEventRecord"] * 2
    (alone,) = engine.event_times(images(), runs=1, data_transfers=False)
    assert (alone.to_device_ms, alone.to_host_ms) == (None, None)
    assert not alone.modes.data_transfers


def test_shared_memory_is_used_without_copies_where_it_is_faster(
    driver: Driver, trt: Any, tmp_path: Path
) -> None:
    driver.integrated.value = 1
    calls: list[bool] = []

    def pick(copying: Any, sharing: Any) -> Any:
        calls.append(sharing.session.zero_copy and not copying.session.zero_copy)
        return sharing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpvit_engines.tensorrt.engine._faster", pick)
        engine = TensorRtEngine(write_plan(tmp_path), library=driver.path)
    assert calls == [True]
    driver.forget()
    engine.infer(images())
    assert not [name for name in driver.names if name.startswith("cuMemcpy")]
    engine.close()
    assert driver.live == 0


@pytest.mark.parametrize(("what", "words"), [("bind", "refused the address"), ("run", "not run")])
def test_tensorrts_false_is_an_error(
    driver: Driver, trt: Any, tmp_path: Path, what: str, words: str
) -> None:
    original = trt.Runtime(None).deserialize_cuda_engine(b"plan").create_execution_context

    def failing() -> Any:
        context = original()
        context.fails = what
        return context

    trt.Runtime(None).deserialize_cuda_engine(b"plan").create_execution_context = failing
    with pytest.raises(EngineError, match=words):
        TensorRtEngine(write_plan(tmp_path), library=driver.path)
    assert driver.live == 0


def test_layer_times_come_from_a_context_of_their_own(
    engine: TensorRtEngine, trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group,) = engine.layer_times(("head", "softmax", "fc1"), runs=3)
    assert group.median_ms == 0.25
    assert group.layers == ("head", "softmax")
    assert group.is_fused
    assert len(trt.contexts) == 2
    assert trt.contexts[0].profiler is None


def test_a_plan_of_another_device_is_refused_with_both_sides(
    driver: Driver, trt: Any, tmp_path: Path
) -> None:
    other = DeviceKey(
        gpu="Orin", compute_capability="8.7", multiprocessors=16, memory_gib=8, tensorrt="10.16.2"
    )
    with pytest.raises(DeviceMismatchError) as caught:
        TensorRtEngine(write_plan(tmp_path, device=other), library=driver.path)
    assert caught.value.exit_code == 7
    assert "multiprocessors is 16 there and 8 here" in str(caught.value)
    assert "tensorrt is 10.16.2 there and 10.3.0 here" in str(caught.value)
    assert driver.live == 0


def test_a_plan_that_was_changed_or_cannot_be_loaded_is_refused(
    driver: Driver, trt: Any, tmp_path: Path
) -> None:
    onnx = write_plan(tmp_path, content=b"broken")
    with pytest.raises(EngineError, match="TensorRT cannot load the engine"):
        TensorRtEngine(onnx, library=driver.path)
    plan_file.plan_path(onnx, plan_file.sha256(b"broken")).write_bytes(b"plan of somebody")
    with pytest.raises(LpvitEdgeError, match=r"is not the plan that model\.plan\.json describes"):
        TensorRtEngine(onnx, library=driver.path)
    onnx.write_bytes(b"another model")
    assert plan_file.read(onnx, ORIN) is None  # stale, to be built again
    assert driver.live == 0


def test_the_engine_keeps_to_the_contract_of_engines(engine: TensorRtEngine) -> None:
    with pytest.raises(EngineError, match=r"the input has shape \(7,\); this model was compiled"):
        engine.infer(np.zeros(7, np.float32))
    with pytest.raises(EngineError, match="the input is float64; convert it"):
        engine.infer(np.zeros(SHAPES["x"]))  # type: ignore[arg-type]
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        engine.infer(images())
    with pytest.raises(EngineError, match=r"no model file .*absent\.onnx"):
        TensorRtEngine(Path("absent.onnx"))


def test_without_a_driver_the_machine_is_named_unfit(trt: Any, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="need an NVIDIA driver"):
        TensorRtEngine(write_plan(tmp_path), library="libcuda-absent.so.1")


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old: Any = SimpleNamespace(__version__="8.6.2")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(EnvironmentUnfitError, match=r"TensorRT 8\.6\.2 is too old"):
        TensorRtEngine(write_plan(tmp_path))


def test_a_profile_takes_times_of_layers_alone_and_names_those_that_share_a_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lpvit_edge.in_place import in_place_ms
    from lpvit_edge.records import LayerShape
    from lpvit_engines.tensorrt.times import GroupTime

    times = [("fc1", 0.5), ("fc1", 0.25), ("fc2 qkv", 0.75), ("qkv", 0.125), ("", 9.0)]
    groups = tuple(
        GroupTime(originals=(names,), layers=tuple(names.split()), median_ms=ms, kernel="k")
        for names, ms in times
    )
    loaded = nullcontext(SimpleNamespace(layer_times=lambda names, runs: groups))
    monkeypatch.setattr("lpvit_engines.load_engine", lambda *_: loaded)
    layers = tuple(
        LayerShape(name=name, tokens=5, in_features=8, out_features=8)
        for name in ("fc1", "fc2", "qkv", "proj")
    )
    found = in_place_ms(tmp_path, layers, engine="tensorrt", threads=1)
    assert found == {"fc1": 0.75}
    assert "one kernel, whose time is not divided: fc2 + qkv (0.750 ms)" in capsys.readouterr().err
    assert in_place_ms(tmp_path, layers, engine="fake", threads=1) == {}


def test_a_kernel_goes_with_its_context_and_is_loaded_anew(driver: Driver) -> None:
    def kernel() -> Any:
        return kernel_for(block_rows=64, block_cols=16, activation="gelu", library=driver.path)

    with opened(driver.path) as device, device.calls.current(device.context):
        first = kernel()
        with opened(driver.path):
            assert kernel() is first
        assert kernel() is first  # an engine that closes leaves the others theirs
        assert driver.state.unloads == 0
    assert driver.state.unloads == 1  # torch may hold the context on
    with opened(driver.path) as device, device.calls.current(device.context):
        assert kernel() is not first


def test_a_plan_that_nobody_compared_is_not_put_in_service(
    driver: Driver, trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = write_plan(tmp_path)
    beside = plan_file.manifest_path(onnx)
    manifest = plan_file.read_manifest(beside)
    unproven = msgspec.structs.replace(manifest, proofs=None)
    beside.write_bytes(msgspec.json.encode(unproven))
    TensorRtEngine(onnx, library=driver.path).close()  # to try, it will do
    asked: list[bool] = []

    def built(*_: Any, proven: bool, **__: Any) -> Any:
        asked.append(proven)
        raise EngineError("no TensorRT here builds")

    monkeypatch.setattr("lpvit_engines.tensorrt.engine.build_plan", built)
    with pytest.raises(EngineError, match="no TensorRT here builds"):
        TensorRtEngine(onnx, library=driver.path, accept=lambda engine: None)
    assert asked == [True]
