"""A plan on disk, and the engine that serves it on a fake TensorRT and a fake CUDA driver."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lpvit_engines.tensorrt import plan_file
from lpvit_engines.tensorrt.engine import TensorRtEngine
from lpvit_engines.tensorrt.inspector import EngineLayer
from lpvit_engines.tensorrt.plan_file import DeviceKey, PlanManifest
from lpvit_engines.tensorrt.sparsity import SparsityCount
from tests.cuda.fake_driver import compile_fake_driver
from tests.cuda.runtime_driver import Driver
from tests.trt.fake_trt import fake_tensorrt

SHAPES = {"x": (2, 3, 4, 4), "logits": (2, 5), "features": (2, 3)}
ORIN = DeviceKey(
    gpu="Orin", compute_capability="8.7", multiprocessors=8, memory_gib=8, tensorrt="10.3.0"
)


def compute(arrays: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    means = arrays["x"].mean(axis=(2, 3))
    weight = np.arange(15, dtype=np.float32).reshape(3, 5)
    return {"features": means, "logits": means @ weight}


def images(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SHAPES["x"]).astype(np.float32)


def write_plan(
    folder: Path, *, device: DeviceKey = ORIN, content: bytes = b"plan of a model"
) -> Path:
    onnx = folder / "model.onnx"
    onnx.write_bytes(b"an ONNX file")
    plan_file.write(onnx, content, manifest_of(onnx, device=device, content=content))
    return onnx


def manifest_of(onnx: Path, *, device: DeviceKey, content: bytes) -> PlanManifest:
    head = EngineLayer(
        name="head + softmax",
        kernel="sm80_gemm",
        originals=("head/MatMul", "softmax"),
        sparse=False,
    )
    return PlanManifest(
        kind=plan_file.KIND,
        format=plan_file.FORMAT,
        onnx_sha256=plan_file.sha256(onnx.read_bytes()),
        plan_sha256=plan_file.sha256(content),
        device=device,
        cuda_driver=12060,
        precision="float16",
        strongly_typed=True,
        sparsity=SparsityCount(eligible=0, chosen=0),
        memory_skips=0,
        proofs=(),
        layers=(head,),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_driver(tmp_path_factory.mktemp("driver"), source="fake_runtime.c")


@pytest.fixture
def driver(library: Path) -> Driver:
    return Driver(library)


@pytest.fixture
def trt(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = fake_tensorrt(SHAPES, compute, driver=driver)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
    return module


@pytest.fixture
def engine(driver: Driver, trt: Any, tmp_path: Path) -> Iterator[TensorRtEngine]:
    with TensorRtEngine(write_plan(tmp_path), library=driver.path) as loaded:
        yield loaded
