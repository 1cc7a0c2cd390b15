"""The copy of a model that TensorRT reads: the same function, in float16 and opset 17."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lpvit_edge.errors import EngineError, ModelError
from lpvit_edge.onnx_nodes import repeated_layer_model
from lpvit_engines.block_sparse import BlockSparseMatrix
from lpvit_engines.tensorrt.onnx_copy import OPSET, tensorrt_copy
from lpvit_engines.tensorrt.operators import SUPPORTED
from lpvit_engines.tensorrt.sparse_layers import is_two_four, sparse_layers
from lpvit_engines.tensorrt.trials import layer_model

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 56, "window_size": 7, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


@pytest.fixture(scope="module", params=MODELS)
def portable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    timm = pytest.importorskip("timm")
    import torch

    from lpvit_edge.export import export_onnx
    from lpvit_edge.layers import walk

    name, arguments = MODELS[request.param]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **arguments).eval()
    size = arguments["img_size"]
    path = tmp_path_factory.mktemp("copy") / "model.onnx"
    export_onnx(model, walk(model, image_size=size), {}, path, image_size=size)
    return onnx.load(path)


def outputs(model: Any, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    answers: Any = session.run(None, {session.get_inputs()[0].name: x})
    return dict(zip(names, answers, strict=True))


def images(model: Any) -> NDArray[np.float32]:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_the_copy_of_a_whole_model_computes_what_the_portable_file_does(portable: Any) -> None:
    copy, x = tensorrt_copy(portable), images(portable)
    expected, found = outputs(portable, x), outputs(copy, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert np.abs(found[name] - value).max() <= 5e-3 * np.abs(value).max()
    single = outputs(tensorrt_copy(portable, half=False), x)
    for name, value in expected.items():
        assert np.abs(single[name] - value).max() <= 1e-5 * np.abs(value).max()


def test_the_copy_is_opset_17_of_operators_tensorrt_has(portable: Any) -> None:
    copy = tensorrt_copy(portable)
    assert [(x.domain, x.version) for x in copy.opset_import] == [("", OPSET)]
    assert {node.op_type for node in copy.graph.node} <= SUPPORTED
    assert "Gelu" not in {node.op_type for node in copy.graph.node}
    onnx.checker.check_model(copy, full_check=True)  # infers every type strictly


def test_only_layer_norms_stay_float32(portable: Any) -> None:
    copy = onnx.shape_inference.infer_shapes(tensorrt_copy(portable), strict_mode=True)
    types = {v.name: v.type.tensor_type.elem_type for v in copy.graph.value_info}
    norms = [n for n in copy.graph.node if n.op_type == "LayerNormalization"]
    assert norms
    edges = {n.output[0] for n in norms} | {n.input[0] for n in norms}
    single = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
    assert single == edges
    casts = [node for node in copy.graph.node if node.op_type == "Cast"]
    assert len(casts) == 2 * len(norms) + 1 + len(copy.graph.output)


def test_attention_scales_its_operands_before_the_first_product(portable: Any) -> None:
    """TensorRT fuses attention only where nothing but a mask stands between product and softmax."""
    copy = tensorrt_copy(portable)
    made_by = {name: node for node in copy.graph.node for name in node.output}
    softmaxes = [node for node in copy.graph.node if node.op_type == "Softmax"]
    assert softmaxes
    for softmax in softmaxes:
        before = made_by[softmax.input[0]]
        while before.op_type in ("Add", "Reshape"):  # the masks of Swin
            before = made_by[before.input[0]]
        assert before.op_type == "MatMul"


@pytest.fixture
def matrix() -> Callable[..., BlockSparseMatrix]:
    def make(rows: int = 64, cols: int = 16) -> BlockSparseMatrix:
        generator = np.random.default_rng(1)
        keep = generator.random((128 // rows, 64 // cols)) < 0.5
        weight = generator.standard_normal((128, 64)).astype(np.float32) / 8
        return BlockSparseMatrix.from_dense(
            np.where(keep.repeat(rows, 0).repeat(cols, 1), weight, np.float32(0)),
            block_rows=rows,
            block_cols=cols,
        )

    return make


def layer(*copies: Any, activation: str = "gelu") -> Any:
    return repeated_layer_model(
        tokens=5, in_features=64, out_features=128, activation=activation, copies=[*copies]
    )


def test_a_sparse_node_carries_what_the_kernel_reads_and_no_function(
    matrix: Callable[..., BlockSparseMatrix],
) -> None:
    copy = tensorrt_copy(layer(matrix()))
    assert len(copy.functions) == 0
    (node,) = [n for n in copy.graph.node if n.domain == "lpvit"]
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert given == {
        "block_rows": 64, "block_cols": 16, "in_features": 64, "out_features": 128,
        "activation": b"gelu", "plugin_namespace": b"lpvit", "plugin_version": b"1",
    }  # fmt: skip
    types = {x.name: x.data_type for x in copy.graph.initializer}
    half, int32 = TensorProto.FLOAT16, TensorProto.INT32
    assert [types[name] for name in node.input[1:]] == [half, int32, int32, half]


def test_packed_weights_are_the_weights(matrix: Callable[..., BlockSparseMatrix]) -> None:
    """Unpacked by a walk of our own, as the kernel walks: panel by panel, segment by segment."""
    sparse = matrix()
    copy = tensorrt_copy(layer(sparse))
    (node,) = [n for n in copy.graph.node if n.domain == "lpvit"]
    arrays = {x.name: numpy_helper.to_array(x) for x in copy.graph.initializer}
    panels, rows, columns = (arrays[name] for name in node.input[1:4])
    weight = np.zeros((128, 64), np.float32)
    for block_row, first, end, _ in rows:
        for panel in range(first, end):
            for segment in range(4):
                column = columns[panel * 4 + segment]
                part = panels[panel, :, segment * 16 : segment * 16 + 16].astype(np.float32)
                weight[block_row * 64 : block_row * 64 + 64, column : column + 16] += part
    assert weight == pytest.approx(sparse.to_dense().astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_layer_reverted_to_dense_computes_the_same(
    matrix: Callable[..., BlockSparseMatrix], activation: str
) -> None:
    portable = layer(matrix(), activation=activation)
    copy = tensorrt_copy(portable, dense=("layer0",))
    assert not [node for node in copy.graph.node if node.domain]
    x = images(portable)
    expected = outputs(portable, x)["y"]
    assert outputs(copy, x)["y"] == pytest.approx(
        expected, abs=5e-3 * float(np.abs(expected).max())
    )


def product(model: Any) -> Any:
    return next(node for node in model.graph.node if node.op_type == "MatMul")


def two_four_weight() -> NDArray[np.float32]:
    weight = np.random.default_rng(2).standard_normal((128, 64)).astype(np.float32)
    weight.reshape(128, 16, 4)[:, :, [1, 3]] = 0
    return weight


def test_two_four_layers_are_found_stay_plain_products_and_keep_their_zeros() -> None:
    portable = layer(two_four_weight())
    assert sparse_layers(portable) == {"layer0": "2:4"}
    copy = tensorrt_copy(portable)
    (node,) = [n for n in copy.graph.node if n.op_type == "MatMul"]
    arrays = {x.name: numpy_helper.to_array(x) for x in copy.graph.initializer}
    assert is_two_four(arrays[node.input[1]])


def test_a_two_four_layer_reverted_is_no_longer_two_four_and_barely_changes() -> None:
    portable = layer(two_four_weight(), activation="none")
    product(portable).name = "layer0/MatMul"  # as an exported model names it
    copy = tensorrt_copy(portable, dense=("layer0",))
    assert sparse_layers(copy) == {}
    x = images(portable)
    kept, reverted = outputs(tensorrt_copy(portable), x)["y"], outputs(copy, x)["y"]
    assert reverted == pytest.approx(kept, abs=2e-3)


def test_an_empty_weight_is_no_two_four_weight() -> None:
    assert not is_two_four(np.zeros((8, 8), np.float32))
    assert not is_two_four(np.ones((6, 8), np.float32))


def test_an_exported_model_with_sparse_nodes_is_copied_and_cut_up(tiny_project: Path) -> None:
    import torch

    from lpvit_edge.export import export_onnx
    from lpvit_edge.layers import walk
    from lpvit_edge.models import load_model
    from lpvit_edge.pattern import parse_pattern

    module: Any = load_model(str(tiny_project / "model.toml"), weights=None).module
    with torch.no_grad():
        module.get_submodule("blocks.0.mlp.fc1").weight[:64, :16] = 0
    patterns = {f"blocks.0.mlp.{name}": parse_pattern("64x16") for name in ("fc1", "fc2")}
    path = tiny_project / "sparse.onnx"
    export_onnx(module, walk(module, image_size=32), patterns, path, image_size=32)
    portable = onnx.load(path)
    assert sparse_layers(portable) == dict.fromkeys(patterns, "64x16")
    copy = tensorrt_copy(portable)
    assert [node.name for node in copy.graph.node if node.domain] == list(patterns)
    x = images(portable)
    expected = outputs(portable, x)["logits"]
    dense = outputs(tensorrt_copy(portable, dense=tuple(patterns)), x)["logits"]
    assert dense == pytest.approx(expected, abs=5e-3 * float(np.abs(expected).max()))
    for name in patterns:
        alone = layer_model(portable, name)
        assert sparse_layers(alone) == {name: "64x16"}
        assert tensorrt_copy(alone).graph.node


def test_a_layer_alone_is_cut_out_with_its_weights(
    matrix: Callable[..., BlockSparseMatrix],
) -> None:
    portable = onnx.shape_inference.infer_shapes(layer(two_four_weight()))
    product(portable).name = "layer0/MatMul"
    alone = layer_model(portable, "layer0")
    assert [node.op_type for node in alone.graph.node] == ["MatMul"]
    assert sparse_layers(alone) == {"layer0": "2:4"}
    with pytest.raises(EngineError, match="has no layer fc9"):
        layer_model(portable, "fc9")


def test_a_block_without_a_kernel_is_refused(matrix: Callable[..., BlockSparseMatrix]) -> None:
    with pytest.raises(EngineError, match=r"sparse node .+: no GPU kernel for blocks of 64x1 "):
        tensorrt_copy(layer(matrix(64, 1)))


def test_a_bias_of_another_length_is_refused(matrix: Callable[..., BlockSparseMatrix]) -> None:
    portable = layer(matrix())
    (node,) = [n for n in portable.graph.node if n.domain == "lpvit"]
    (bias,) = [x for x in portable.graph.initializer if x.name == node.input[4]]
    bias.CopyFrom(numpy_helper.from_array(np.zeros(127, np.float32), bias.name))
    with pytest.raises(EngineError, match=r"has 128 outputs and a bias of shape \(127,\)"):
        tensorrt_copy(portable)


def test_another_version_of_the_node_is_refused(matrix: Callable[..., BlockSparseMatrix]) -> None:
    portable = layer(matrix())
    (node,) = [n for n in portable.graph.node if n.domain == "lpvit"]
    next(a for a in node.attribute if a.name == "plugin_version").s = b"2"
    with pytest.raises(EngineError, match="BlockSparseLinear version 2; this version knows"):
        tensorrt_copy(portable)


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(ModelError, match="holds 1e\\+06, which float16 cannot"):
        tensorrt_copy(layer(np.full((128, 64), 1e6, np.float32)))


def test_an_unknown_operator_is_refused_by_name(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"])], "g", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    with pytest.raises(EngineError, match=r"TensorRT 10\.3 has no operator Det"):
        tensorrt_copy(model)
