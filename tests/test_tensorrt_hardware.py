"""TensorRT on the device it is made for. Nothing else here has a real one under it.

LPVIT_REQUIRE_HARDWARE=tensorrt turns the skips into failures on a machine that is meant to have it.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx.shape_inference import infer_shapes

from lpvit_edge.doctor_tensorrt import examine_tensorrt
from lpvit_edge.onnx_nodes import repeated_layer_model
from lpvit_engines import load_engine
from lpvit_engines.block_sparse import BlockSparseMatrix
from lpvit_engines.tensorrt import ahead_of_time, plan_file
from lpvit_engines.tensorrt.engine import TensorRtEngine
from lpvit_engines.tensorrt.library import version_of
from lpvit_profilers.device import identify

REQUIRED = os.environ.get("LPVIT_REQUIRE_HARDWARE") == "tensorrt"
trt: Any = (
    import_module("tensorrt")
    if REQUIRED
    else pytest.importorskip("tensorrt", reason="TensorRT comes with JetPack")
)
pytestmark = pytest.mark.hardware("tensorrt")
TOKENS, WIDTH = 64, 512
X: NDArray[np.float32] = (
    np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A dense, a 2:4 and a block-sparse layer; one number of each goes out."""
    rng = np.random.default_rng(0)
    dense, two_four, blocks = (
        (rng.standard_normal((WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) for _ in range(3)
    )
    two_four.reshape(WIDTH, -1, 4)[:, :, 2:] = 0
    blocks.reshape(WIDTH // 64, 64, -1)[::2, :, : WIDTH // 2] = 0
    sparse = BlockSparseMatrix.from_dense(blocks, block_rows=64, block_cols=16)
    portable = repeated_layer_model(
        tokens=TOKENS, in_features=WIDTH, out_features=WIDTH, activation="gelu",
        copies=[dense, two_four, sparse],
    )  # fmt: skip
    path = tmp_path / "model.onnx"
    path.write_bytes(infer_shapes(portable).SerializeToString())
    return path


def on_the_processor(path: Path) -> NDArray[np.float32]:
    with load_engine("openvino", path) as engine:
        return engine.infer(X)


def test_the_doctor_finds_nothing_to_mend() -> None:
    found = examine_tensorrt(identify())
    wrong = [(f.name, f.found, f.remedy) for f in found if f.status != "ok"]
    # TensorRT times 2:4 against dense in every build, and on a small layer either may win.
    assert [x for x in wrong if not x[1].startswith("built with a dense kernel")] == []


def test_a_proven_engine_answers_as_the_processor_does_from_one_graph(model: Path) -> None:
    """The plugin survives capture, and its kernels are those of this device."""
    with TensorRtEngine(model, rebuild=True) as engine:
        assert engine.infer(X) == pytest.approx(on_the_processor(model), abs=0.01)
        times = engine.event_times(X, runs=20)
        assert all(time.modes.cuda_graph and time.compute_ms > 0 for time in times)
        assert {proof.pattern for proof in engine.manifest.proofs or ()} == {"2:4", "64x16"}
        assert engine.layer_times((), runs=3)
    with TensorRtEngine(model) as again:
        assert again.infer(X) == pytest.approx(on_the_processor(model), abs=0.01)


def test_arrays_of_torch_go_in_and_out_in_place(model: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    x = torch.from_numpy(X).cuda()
    out = torch.empty((1, 1, 3), device="cuda")
    with TensorRtEngine(model) as engine:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        engine.infer_into(x, {"y": out}, stream=stream.cuda_stream)
        stream.synchronize()
        assert out.cpu().numpy() == pytest.approx(engine.infer(X), abs=0.001)


def test_a_plan_with_its_kernels_in_it_answers_alike(model: Path) -> None:
    """Built and loaded in processes of their own: this one may have the other form."""
    if version_of(trt) < ahead_of_time.OLDEST:
        pytest.skip(f"TensorRT {trt.__version__} keeps no kernels in plans")
    arguments = ["build", str(model), "--engine", "tensorrt", "--python-free"]
    subprocess.run([sys.executable, "-m", "lpvit_edge", *arguments], check=True)
    assert plan_file.read_manifest(plan_file.manifest_path(model)).python_free
    with TensorRtEngine(model) as engine:
        assert engine.infer(X) == pytest.approx(on_the_processor(model), abs=0.01)
