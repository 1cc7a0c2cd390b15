"""int8 on the linear layers alone: the copy, its calibration, and an engine built from both."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.shape_inference import infer_shapes

from lpvit_edge.errors import DataError, EngineError, FileFormatError, MismatchError
from lpvit_edge.onnx_nodes import repeated_layer_model
from lpvit_engines import load_engine, resolve_precision
from lpvit_engines.block_sparse import BlockSparseMatrix
from lpvit_engines.tensorrt import plan_file
from lpvit_engines.tensorrt import ranges as ranging
from lpvit_engines.tensorrt.engine import TensorRtEngine
from lpvit_engines.tensorrt.int8_copy import scales
from lpvit_engines.tensorrt.making import make_plan
from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy
from lpvit_engines.tensorrt.operators import SUPPORTED
from lpvit_engines.tensorrt.rounding import emulated
from lpvit_engines.tensorrt.sparse_layers import sparse_layers
from tests.cuda.fake_driver import compile_fake_driver
from tests.cuda.runtime_driver import Driver
from tests.trt.fake_builder import building_tensorrt

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.float32]]:
    """(portable file of a small ViT, 24 images)."""
    timm = pytest.importorskip("timm")
    import torch

    from lpvit_edge.export import export_onnx
    from lpvit_edge.layers import walk

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, embed_dim=64, depth=2,
        num_heads=2,
    ).eval()  # fmt: skip
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(model, walk(model, image_size=32), {}, path, image_size=32)
    images = np.random.default_rng(0).standard_normal((24, 3, 32, 32)).astype(np.float32)
    return path, images


@pytest.fixture(scope="module")
def found(vit: tuple[Path, NDArray[np.float32]]) -> ranging.Ranges:
    return ranging.find_ranges(*vit)


def test_every_linear_layer_is_calibrated_but_the_classifier(
    vit: tuple[Path, NDArray[np.float32]], found: ranging.Ranges
) -> None:
    assert sorted(found.largest) == sorted(f"blocks.{i}.{name}" for i in (0, 1) for name in LINEARS)
    path, images = vit
    portable = onnx.load(path)
    tensor = ranging.inputs_of_linears(portable)["blocks.1.mlp.fc2"]
    portable.graph.output.append(
        onnx.helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None)
    )
    import onnxruntime

    session = onnxruntime.InferenceSession(
        portable.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    read: list[Any] = [session.run([tensor], {"images": image[None]})[0] for image in images]
    seen = float(np.abs(np.stack(read)).max())
    assert 0.9 * seen <= found.largest["blocks.1.mlp.fc2"] <= 1.01 * seen


def test_pairs_stand_around_the_products_of_linear_layers_and_nowhere_else(
    vit: tuple[Path, NDArray[np.float32]], found: ranging.Ranges
) -> None:
    copy = tensorrt_copy(onnx.load(vit[0]), ranges=found.largest)
    onnx.checker.check_model(copy, full_check=True)  # infers every type strictly
    assert [(x.domain, x.version) for x in copy.opset_import] == [("", 19)]
    assert {node.op_type for node in copy.graph.node} <= SUPPORTED
    made_by = {name: node for node in copy.graph.node for name in node.output}
    weights = {x.name: x for x in copy.graph.initializer}
    quantized = set()
    for node in copy.graph.node:
        sources = [made_by.get(name) for name in node.input]
        restored = [s for s in sources if s is not None and s.op_type == "DequantizeLinear"]
        if restored:
            assert node.op_type in ("MatMul", "Gemm")
            assert len(restored) == 2  # what it reads, and its weight
            quantized.add(node.name.rpartition("/")[0])
    assert quantized == set(found.largest)
    pairs = [n for n in copy.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) == 4 * len(found.largest)
    for node in pairs:
        step, zero = (weights[name] for name in node.input[1:])
        assert (step.data_type, zero.data_type) == (TensorProto.FLOAT16, TensorProto.INT8)
        assert not numpy_helper.to_array(zero).any()
        assert (numpy_helper.to_array(step) > 0).all()


def test_the_int8_copy_answers_nearly_as_the_float_model(
    vit: tuple[Path, NDArray[np.float32]], found: ranging.Ranges
) -> None:
    portable = onnx.load(vit[0])
    half, whole = emulated(portable, vit[1]), emulated(portable, vit[1], ranges=found.largest)
    error = np.abs(whole - half).max() / np.abs(half).max()
    assert 1e-4 < error < 0.05
    wrong = {layer: 8.0 * largest for layer, largest in found.largest.items()}
    coarse = emulated(portable, vit[1], ranges=wrong)
    assert np.abs(coarse - half).max() / np.abs(half).max() > 2 * error  # the ranges matter


def test_steps_are_rounded_up_and_never_zero() -> None:
    largest = np.array([0.0, 1e-9, 0.1, 1.0, 127.0, 1000.0])
    steps = scales(largest).astype(np.float64)
    assert (steps > 0).all()
    assert (largest / steps <= 127).all()
    assert steps[2:] == pytest.approx(largest[2:] / 127, rel=2e-3)


def two_four_layer(x: int = 64) -> Any:
    weight = np.random.default_rng(0).standard_normal((x, x)).astype(np.float32)
    weight.reshape(x, x // 4, 4)[:, :, 2:] = 0
    return infer_shapes(
        repeated_layer_model(
            tokens=5, in_features=x, out_features=x, activation="none", copies=[weight]
        )
    )


def int8_weight(copy: Any) -> NDArray[np.int8]:
    """What the weight's pair makes of it, by the definition of QuantizeLinear."""
    arrays = {x.name: numpy_helper.to_array(x) for x in copy.graph.initializer}
    node = next(n for n in copy.graph.node if n.name.endswith(".w/Quantize"))
    weight, step = (arrays[name].astype(np.float32) for name in node.input[:2])
    whole: NDArray[np.int8] = np.clip(np.rint(weight / step), -128, 127).astype(np.int8)
    return whole


def test_two_four_stays_so_in_int8_and_a_reverted_layer_does_not() -> None:
    portable = two_four_layer()
    (layer,) = sparse_layers(portable)
    for dense, expected in (((), True), ((layer,), False)):
        weight = int8_weight(tensorrt_copy(portable, dense=dense, ranges={layer: 3.0}))
        groups = (weight.reshape(16, 4, 64) != 0).sum(axis=1)
        assert bool((groups <= 2).all()) is expected


def block_layer() -> Any:
    weight = np.zeros((64, 64), np.float32)
    weight[:, :32] = np.random.default_rng(1).standard_normal((64, 32)) / 8
    matrix = BlockSparseMatrix.from_dense(weight, block_rows=64, block_cols=16)
    return infer_shapes(
        repeated_layer_model(
            tokens=5, in_features=64, out_features=64, activation="none", copies=[matrix]
        )
    )


def test_a_block_sparse_layer_stays_float16_and_is_int8_once_it_is_dense() -> None:
    portable = block_layer()
    (layer,) = sparse_layers(portable)
    kinds = [n.op_type for n in tensorrt_copy(portable, ranges={layer: 3.0}).graph.node]
    assert "BlockSparseLinear" in kinds
    assert "QuantizeLinear" not in kinds
    dense = tensorrt_copy(portable, dense=(layer,), ranges={layer: 3.0})
    assert [n.op_type for n in dense.graph.node].count("QuantizeLinear") == 2


@pytest.fixture
def driver(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Driver:
    library = compile_fake_driver(tmp_path_factory.mktemp("driver"), source="fake_runtime.c")
    found = Driver(library)
    found.fail("cuStreamBeginCapture", 901)  # a fake graph would compute nothing
    monkeypatch.setitem(sys.modules, "tensorrt", building_tensorrt())
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def calibrated(folder: Path, portable: Any, **changes: Any) -> Path:
    """An ONNX file with ranges beside it."""
    path = folder / "model.onnx"
    path.write_bytes(portable.SerializeToString())
    given = {
        "kind": ranging.KIND,
        "format": ranging.FORMAT,
        "onnx_sha256": plan_file.sha256(path.read_bytes()),
        "images": 24,
        "images_sha256": "00",
        "percentile": 99.999,
        "largest": dict.fromkeys(sparse_layers(portable), 3.0),
        **changes,
    }
    ranging.ranges_path(path).write_bytes(ranging.encoded(ranging.Ranges(**given)))
    return path


def test_an_int8_plan_lives_beside_the_float16_one_and_says_what_is_int8(
    driver: Driver, tmp_path: Path
) -> None:
    path = calibrated(tmp_path, two_four_layer())
    x = np.random.default_rng(2).standard_normal((1, 5, 64)).astype(np.float32)
    answers = {}
    for precision in ("float16", "int8"):
        with TensorRtEngine(path, precision=precision, library=driver.path) as engine:
            answers[precision] = engine.infer(x)
    error = np.abs(answers["int8"] - answers["float16"]).max()
    assert 0.0 < error < 0.1 * np.abs(answers["float16"]).max()
    half, whole = (
        plan_file.read_manifest(plan_file.manifest_path(path, name)) for name in ("float16", "int8")
    )
    assert (half.precision, half.int8_layers, half.ranges_sha256) == ("float16", (), None)
    assert whole.precision == "int8"
    assert whole.int8_layers == tuple(sparse_layers(onnx.load(path)))
    assert whole.half_layers == ()
    assert {p.name for p in tmp_path.glob("*.plan.json")} == {
        "model.plan.json",
        "model.int8.plan.json",
    }
    assert len(list(tmp_path.glob("*.plan"))) == 2


def test_layer_trials_of_int8_are_int8_and_blocks_are_named_float16(
    driver: Driver, tmp_path: Path
) -> None:
    from lpvit_engines.tensorrt.device import opened

    path = calibrated(tmp_path, two_four_layer())
    built: list[bytes] = []
    trt: Any = sys.modules["tensorrt"]
    real = trt.OnnxParser.parse

    def parse(self: Any, content: bytes) -> bool:
        built.append(content)
        return bool(real(self, content))

    trt.OnnxParser.parse = parse
    with opened(driver.path) as device, device.calls.current(device.context):
        make_plan(path, device, proven=True, precision="int8")
    assert len(built) == 3  # the layer 2:4, its dense twin, the whole network
    for content in built:
        assert "QuantizeLinear" in {n.op_type for n in onnx.load_from_string(content).graph.node}
    blocks = calibrated(tmp_path, block_layer())
    with opened(driver.path) as device, device.calls.current(device.context):
        manifest = make_plan(blocks, device, proven=False, precision="int8")
    assert manifest.int8_layers == ()
    assert manifest.half_layers == tuple(sparse_layers(onnx.load(blocks)))


def test_other_ranges_make_another_plan(driver: Driver, tmp_path: Path) -> None:
    path = calibrated(tmp_path, two_four_layer())
    TensorRtEngine(path, precision="int8", library=driver.path).close()
    before = plan_file.read_manifest(plan_file.manifest_path(path, "int8"))
    calibrated(tmp_path, two_four_layer(), images=25)
    TensorRtEngine(path, precision="int8", library=driver.path).close()
    after = plan_file.read_manifest(plan_file.manifest_path(path, "int8"))
    assert after.ranges_sha256 != before.ranges_sha256


def test_what_int8_lacks_is_said_in_words(tmp_path: Path, driver: Driver) -> None:
    path = calibrated(tmp_path, two_four_layer())
    ranging.ranges_path(path).unlink()
    with pytest.raises(EngineError, match=r"not calibrated for int8.*lpvit build --precision int8"):
        TensorRtEngine(path, precision="int8", library=driver.path)
    calibrated(tmp_path, two_four_layer(), onnx_sha256="of another file")
    with pytest.raises(MismatchError, match=r"is of another network than model\.onnx"):
        TensorRtEngine(path, precision="int8", library=driver.path)
    calibrated(tmp_path, two_four_layer(), largest={"layer0": float("inf")})
    with pytest.raises(FileFormatError):
        TensorRtEngine(path, precision="int8", library=driver.path)
    with pytest.raises(EngineError, match="tensorrt does not run in 'bf16'; it has: float16, int8"):
        load_engine("tensorrt", path, precision="bf16")
    assert resolve_precision("tensorrt", "fp16") == "float16"


def test_too_few_images_and_a_model_that_does_not_bear_int8_are_refused(
    vit: tuple[Path, NDArray[np.float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpvit_edge.int8 import calibrate

    path = tmp_path / "model.onnx"
    path.write_bytes(vit[0].read_bytes())
    with pytest.raises(DataError, match="5 can be read; give 16 or more"):
        calibrate(path, vit[1][:5])
    kept = calibrate(path, vit[1])
    assert kept.agreement is not None
    assert kept.agreement >= 0.95
    assert ranging.read_ranges(path)[0] == kept
    ranging.ranges_path(path).unlink()

    def useless(portable: Any, images: Any, *, ranges: Any) -> Any:
        return -emulated(portable, images)

    monkeypatch.setattr("lpvit_engines.tensorrt.rounding.emulated", useless)
    with pytest.raises(EngineError, match="does not bear int8"):
        calibrate(path, vit[1])
    assert not ranging.ranges_path(path).exists()


def test_the_table_says_what_is_int8_and_what_is_not() -> None:
    import io

    from rich.console import Console

    from lpvit_edge.tensorrt_build import show
    from lpvit_engines.tensorrt.sparsity import SparsityCount

    manifest: Any = SimpleNamespace(
        proofs=(), sparsity=SparsityCount(eligible=None, chosen=None), memory_skips=0,
        int8_layers=("a", "b"), half_layers=("blocks.0.mlp.fc1",), attention=None,
    )  # fmt: skip
    text = io.StringIO()
    show(manifest, Console(file=text, width=100))
    assert "int8: 2 linear layers" in text.getvalue()
    assert "float16, as their block-sparse kernel: blocks.0.mlp.fc1" in text.getvalue()
