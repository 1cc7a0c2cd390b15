"""Arrays that lie on the device already go in and come out as they are, on the caller's stream."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.engine import TensorRtEngine
from tests.cuda.runtime_driver import Driver
from tests.trt.fake_trt import fake_tensorrt
from tests.trt.served import SHAPES, compute, images, write_plan


class OnDevice:
    """What pycuda.gpuarray, CuPy and torch have in common; the memory begins where CUDA's does."""

    def __init__(self, array: NDArray[Any], **changes: Any) -> None:
        whole = np.empty(array.nbytes + 256, np.uint8)
        begin = -whole.ctypes.data % 256
        self.array = whole[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "version": 3, "strides": None,
            "data": (self.array.ctypes.data, False), "stream": None, **changes,
        }  # fmt: skip


def results(**changes: Any) -> dict[str, OnDevice]:
    return {
        name: OnDevice(np.zeros(SHAPES[name], np.float32), **changes)
        for name in ("logits", "features")
    }


def test_arrays_on_the_device_go_in_and_out_without_a_copy_on_the_callers_stream(
    driver: Driver, engine: TensorRtEngine, trt: Any
) -> None:
    x, out = images(), results()
    before = dict(trt.contexts[0].addresses)
    driver.forget()
    engine.infer_into(OnDevice(x), out, stream=0x55)
    assert trt.contexts[0].streams[-1] == 0x55
    assert out["logits"].array == pytest.approx(compute({"x": x})["logits"], abs=1e-5)
    assert not [n for n in driver.names if n.startswith(("cuMemcpy", "cuStreamSync", "cuMemAlloc"))]
    assert trt.contexts[0].addresses == before  # the engine's own, for the next infer()


def test_the_stream_that_makes_an_array_is_waited_for(
    driver: Driver, engine: TensorRtEngine
) -> None:
    driver.forget()
    engine.infer_into(OnDevice(images(), stream=0x66), results(), stream=0x55)
    recorded = next(c for c in driver.calls if c.startswith("cuEventRecord"))
    waited = next(c for c in driver.calls if c.startswith("cuStreamWaitEvent"))
    assert recorded.endswith(", 0x66)")
    assert waited.startswith("cuStreamWaitEvent(0x55, ")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (images(), "without __cuda_array_interface__"),
        (OnDevice(images().astype(np.float64)), "is <f8 of shape"),
        (OnDevice(images()[:1]), r"wants float32 \(<f4\) of shape \(2, 3, 4, 4\)"),
        (OnDevice(images(), strides=(4, 4, 4, 4)), "is not contiguous"),
        (
            OnDevice(images(), data=(0x1010, False)),
            "lies at 0x1010; TensorRT wants multiples of 256",
        ),
        (OnDevice(images(), stream=0), "names stream 0, which the interface forbids"),
    ],
)
def test_an_array_that_would_need_a_copy_is_refused(
    engine: TensorRtEngine, x: Any, words: str
) -> None:
    with pytest.raises(EngineError, match=words):
        engine.infer_into(x, results(), stream=0)


def test_an_array_of_another_context_is_refused_with_the_remedy(
    driver: Driver, engine: TensorRtEngine
) -> None:
    driver.pointer_context.value = 0xBAD
    with pytest.raises(EngineError, match=r"another CUDA context .* import pycuda\.autoprimaryctx"):
        engine.infer_into(OnDevice(images()), results(), stream=0)


def test_memory_of_a_pool_belongs_to_a_device_and_to_no_context(
    driver: Driver, engine: TensorRtEngine
) -> None:
    """cudaMallocAsync, and what torch and CuPy make of it."""
    driver.pointer_context.value = None
    x, out = images(), results()
    engine.infer_into(OnDevice(x), out, stream=0x55)
    assert out["logits"].array == pytest.approx(compute({"x": x})["logits"], abs=1e-5)
    driver.pointer_ordinal.value = 1
    with pytest.raises(EngineError, match="x lies on device 1, the engine on device 0; copy it"):
        engine.infer_into(OnDevice(x), out, stream=0x55)


def test_an_address_that_cuda_does_not_know_is_said_to_be_the_hosts(
    driver: Driver, engine: TensorRtEngine
) -> None:
    driver.fail("cuPointerGetAttribute", 1)
    with pytest.raises(
        EngineError, match=r"x lies at 0x\w+, which is no memory of CUDA's; use inf"
    ):
        engine.infer_into(OnDevice(images()), results(), stream=0)


def test_an_interface_without_its_keys_is_named(engine: TensorRtEngine) -> None:
    broken = OnDevice(images())
    del broken.__cuda_array_interface__["typestr"]
    with pytest.raises(EngineError, match=r"__cuda_array_interface__ of x lacks typestr"):
        engine.infer_into(broken, results(), stream=0)


def test_an_axis_of_one_may_have_any_stride(driver: Driver, tmp_path: Path) -> None:
    """As in a part of a larger batch."""
    one = {"x": (1, 3, 4, 4), "logits": (1, 5), "features": (1, 3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", fake_tensorrt(one, compute))
        patch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
        with TensorRtEngine(write_plan(tmp_path), library=driver.path) as engine:
            x = images()[:1]
            out = {name: OnDevice(np.zeros(one[name], np.float32)) for name in engine.outputs}
            engine.infer_into(OnDevice(x, strides=(9999, 64, 16, 4)), out, stream=0)
            assert out["logits"].array == pytest.approx(compute({"x": x})["logits"], abs=1e-5)
            with pytest.raises(EngineError, match="is not contiguous"):
                engine.infer_into(OnDevice(x, strides=(192, 64, 16, 8)), out, stream=0)


def test_read_only_results_are_refused(engine: TensorRtEngine) -> None:
    out = results()
    out["logits"] = OnDevice(np.zeros((2, 5), np.float32), data=(0x1000, True))
    with pytest.raises(EngineError, match="logits is read-only"):
        engine.infer_into(OnDevice(images()), out, stream=0)
