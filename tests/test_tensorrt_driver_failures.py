"""Every call of the CUDA driver made to fail: an error in words, and nothing left behind."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lpvit_edge.errors import EngineError, LpvitEdgeError
from lpvit_engines.cuda import calls as driver_calls
from lpvit_engines.tensorrt.device import opened
from lpvit_engines.tensorrt.engine import TensorRtEngine
from lpvit_engines.tensorrt.making import make_plan
from lpvit_engines.tensorrt.plugin import kernel_for
from tests.cuda.runtime_driver import Driver
from tests.test_tensorrt_in_place import OnDevice, results
from tests.test_tensorrt_int8 import block_layer
from tests.trt.fake_builder import building_tensorrt
from tests.trt.served import compute, images, write_plan

LOADING = (
    "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent", "cuDeviceGetName",
    "cuDeviceTotalMem", "cuStreamCreate", "cuEventCreate", "cuMemHostAlloc", "cuMemAlloc",
    "cuStreamSynchronize",
)  # fmt: skip
CAPTURING = ("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate")
SHARING = ("cuMemHostGetDevicePointer",)
BUILDING = ("cuMemGetInfo", "cuCtxGetCurrent")
RUNNING = ("cuCtxPushCurrent", "cuMemcpyHtoDAsync", "cuGraphLaunch", "cuMemcpyDtoHAsync",
           "cuStreamSynchronize")  # fmt: skip
TIMING = ("cuEventRecord", "cuGraphLaunch", "cuEventSynchronize", "cuEventElapsedTime")
IN_PLACE = ("cuCtxPushCurrent", "cuPointerGetAttribute", "cuEventCreate", "cuEventRecord",
            "cuStreamWaitEvent")  # fmt: skip
FREEING = (
    "cuGraphDestroy", "cuGraphExecDestroy", "cuMemFree", "cuMemFreeHost", "cuEventDestroy",
    "cuStreamDestroy", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease",
)  # fmt: skip
LOST = r"719: a kernel that failed on the device. To do: restart the process"


@pytest.mark.parametrize("call", CAPTURING)
def test_a_graph_that_cannot_be_captured_is_done_without(
    driver: Driver, trt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    driver.fail(call, 901)
    with TensorRtEngine(write_plan(tmp_path), library=driver.path) as engine:
        assert "runs without a CUDA graph" in caplog.text
        x = images()
        assert engine.infer(x) == pytest.approx(compute({"x": x})["logits"], abs=1e-5)
        (times,) = engine.event_times(x, runs=1)
        assert not times.modes.cuda_graph
    assert driver.live == 0


@pytest.mark.parametrize("call", LOADING)
def test_a_failure_while_loading_is_in_words_and_leaks_nothing(
    driver: Driver, trt: Any, tmp_path: Path, call: str
) -> None:
    onnx = write_plan(tmp_path)
    TensorRtEngine(onnx, library=driver.path).close()
    loading = driver.names[: driver.names.index("cuGraphDestroy")].count(call)
    assert loading
    for successes in range(loading):
        driver.fail(call, 2, successes)
        words = r"answered CUresult 2: out of device memory. To do: free"
        with pytest.raises(EngineError, match=words):
            TensorRtEngine(onnx, library=driver.path)
        assert driver.live == 0


def infer(engine: TensorRtEngine) -> None:
    engine.infer(images())


def event_times(engine: TensorRtEngine) -> None:
    engine.event_times(images(), runs=1)


def infer_into(engine: TensorRtEngine) -> None:
    engine.infer_into(OnDevice(images(), stream=0x66), results(), stream=0x55)


@pytest.mark.parametrize(
    ("run", "call"),
    [
        *((infer, call) for call in RUNNING),
        *((event_times, call) for call in TIMING),
        *((infer_into, call) for call in IN_PLACE),
    ],
)
def test_a_failure_while_running_is_in_words_and_the_engine_still_runs_and_closes(
    driver: Driver, engine: TensorRtEngine, trt: Any, run: Any, call: str
) -> None:
    live, addresses = driver.live, dict(trt.contexts[0].addresses)
    driver.fail(call, 719)
    with pytest.raises(LpvitEdgeError, match=f"{call}.* {LOST}"):
        run(engine)
    assert driver.live == live
    assert trt.contexts[0].addresses == addresses
    driver.fail("")
    x = images()
    assert engine.infer(x) == pytest.approx(compute({"x": x})["logits"], abs=1e-5)
    engine.close()
    assert driver.live == 0


@pytest.mark.parametrize("call", FREEING)
def test_a_lost_device_does_not_keep_the_engine_from_closing(
    driver: Driver, trt: Any, tmp_path: Path, call: str
) -> None:
    """The fake frees nothing of what it fails to free; everything else goes."""
    engine = TensorRtEngine(write_plan(tmp_path), library=driver.path)
    driver.fail(call, 719)
    engine.close()
    asked = driver.names
    driver.fail("")
    assert asked[-1] == "cuDevicePrimaryCtxRelease"
    assert all(name in asked for name in FREEING)
    assert driver.live == (0 if call.startswith(("cuCtx", "cuGraphD")) else asked.count(call))


@pytest.mark.parametrize("call", BUILDING)
def test_a_failure_before_a_build_is_in_words(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", building_tensorrt(driver=driver))
    load = partial(kernel_for, block_rows=64, block_cols=16, activation="gelu", library=driver.path)
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: load())
    path = tmp_path / "model.onnx"
    path.write_bytes(block_layer().SerializeToString())
    with opened(driver.path) as device, device.calls.current(device.context):
        driver.fail(call, 2)
        with pytest.raises(EngineError, match=f"{call}.* 2: out of device memory"):
            make_plan(path, device, proven=False, cache=tmp_path)
        driver.fail("")
    assert driver.live == 0
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_every_call_of_the_run_time_is_made_to_fail_here() -> None:
    shown = {"cuGraphInstantiateWithFlags": "cuGraphInstantiate"}
    names = {shown.get(n, n.removesuffix("_v2")) for n in driver_calls._PROTOTYPES}
    assert names == {
        *LOADING, *CAPTURING, *SHARING, *BUILDING, *RUNNING, *TIMING, *IN_PLACE, *FREEING
    }  # fmt: skip


def test_an_engine_closes_where_its_context_is_lost(
    driver: Driver, engine: TensorRtEngine, caplog: pytest.LogCaptureFixture
) -> None:
    driver.fail("cuCtxPushCurrent", 719)
    engine.close()
    driver.fail("")
    assert "closes without its CUDA context: cuCtxPushCurrent" in caplog.text
    assert driver.live == 0


def test_a_graph_that_cannot_be_used_is_not_left_behind(
    driver: Driver, trt: Any, tmp_path: Path
) -> None:
    driver.fail("cuGraphInstantiate", 2)
    TensorRtEngine(write_plan(tmp_path), library=driver.path).close()
    assert driver.live == 0
    driver.fail("")
    runtime = trt.Runtime(None).deserialize_cuda_engine(b"plan")
    original = runtime.create_execution_context

    def refusing() -> Any:
        context = original()
        run, calls = context.execute_async_v3, []

        def second_is_false(*, stream_handle: int) -> bool:
            calls.append(stream_handle)
            return False if len(calls) == 2 else run(stream_handle=stream_handle)

        context.execute_async_v3 = second_is_false
        return context

    runtime.create_execution_context = refusing
    TensorRtEngine(write_plan(tmp_path), library=driver.path).close()
    assert driver.live == 0


def test_where_memory_cannot_be_shared_the_engine_copies(
    driver: Driver, trt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    driver.integrated.value = 1
    driver.fail(*SHARING, 2)
    with TensorRtEngine(write_plan(tmp_path), library=driver.path) as engine:
        driver.forget()
        assert engine.infer(images()).shape == (2, 5)
        assert "cuMemcpyHtoDAsync" in driver.names
    assert "memory is not shared" in caplog.text
    assert driver.live == 0
