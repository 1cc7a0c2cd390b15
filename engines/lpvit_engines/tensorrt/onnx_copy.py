"""The copy of the portable ONNX file that TensorRT reads.

It differs in five ways. Opset 17, the newest on which ViTs were seen to work on TensorRT 10.3; 19
for int8 (int8_copy.py).
Tensors are float16 (TensorRT 11 takes its precision from the file alone), LayerNormalization runs
in float32 between casts. Gelu is spelled out, which TensorRT fuses. Sparse nodes carry weights
packed for the kernel. The function body of the sparse node is left out, because TensorRT 10.3 would
prefer it to the plugin. Inputs and outputs of the model stay float32.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError, ModelError
from lpvit_engines.cuda.packing import pack
from lpvit_engines.tensorrt import int8_copy
from lpvit_engines.tensorrt.graph import Graph
from lpvit_engines.tensorrt.half_copy import to_half
from lpvit_engines.tensorrt.operators import SUPPORTED
from lpvit_engines.tensorrt.sparse_layers import DOMAIN, inputs_last

OP, PLUGIN_VERSION = "BlockSparseLinear", "1"
OPSET = 17
IR_VERSION = 8
_NEWEST_OPSET = 20
# The smallest normal float16: one of them where a 2:4 group has a zero makes a weight dense for
# TensorRT and changes the layer by less than its rounding.
_NOT_ZERO = np.float32(2.0**-14)


def tensorrt_copy(
    portable: Any,
    *,
    dense: Collection[str] = (),
    half: bool = True,
    ranges: Mapping[str, float] | None = None,
) -> Any:
    """The TensorRT copy of a portable ModelProto, which is left as it is.

    Layers named in `dense` lose their sparse form: a sparse node becomes a product with the whole
    weight, a 2:4 weight is no longer recognized as one. With `ranges` (largest |input| by layer)
    the products of these layers are int8, in opset 19. Raises EngineError for an operator or a
    block that TensorRT cannot run.
    """
    # Files made for timing carry no shapes, and packing needs the width of a sparse node's input.
    model = require("onnx.shape_inference").infer_shapes(portable)
    opset = OPSET if ranges is None else int8_copy.OPSET
    _refuse_opset(model, oldest=min(opset, 18))
    del model.functions[:]
    graph = Graph(model)
    graph.rewrite(lambda node: _sparse_node(graph, node, dense))
    for layer in dense:
        break_two_four(graph, layer, int8=ranges is not None)
    graph.rewrite(lambda node: _lowered(graph, node, opset=opset))
    if ranges is not None:
        int8_copy.quantize_linears(graph, ranges)
    graph.drop_unused()
    if half:
        to_half(model)
        graph.drop_unused()
    _finish(model, opset=opset)
    refuse_unsupported(model)
    return model


def _refuse_opset(model: Any, *, oldest: int) -> None:
    found = {x.domain: x.version for x in model.opset_import}
    version = found.get("", found.get("ai.onnx", 0))
    if not oldest <= version <= _NEWEST_OPSET:
        raise EngineError(
            f"the ONNX file has opset {version}; the TensorRT engine reads {oldest} to "
            f"{_NEWEST_OPSET}: export it with lpvit build"
        )


def _finish(model: Any, *, opset: int) -> None:
    helper = require("onnx.helper")
    has_plugin = any(node.domain == DOMAIN for node in model.graph.node)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    if has_plugin:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    model.ir_version = IR_VERSION if opset == OPSET else int8_copy.IR_VERSION
    del model.graph.value_info[:]  # their types are the portable file's


def refuse_unsupported(model: Any) -> None:
    """Raise EngineError for an operator that TensorRT 10.3's ONNX parser does not have."""
    ops = {node.op_type for node in model.graph.node if node.domain != DOMAIN}
    unknown = sorted(ops - SUPPORTED)
    if unknown:
        raise EngineError(
            f"TensorRT 10.3 has no operator {', '.join(unknown)}; rewrite that part of the model"
        )


def _sparse_node(graph: Graph, node: Any, dense: Collection[str]) -> list[Any] | None:
    if node.domain != DOMAIN:
        return None
    helper = require("onnx.helper")
    given = {x.name: helper.get_attribute_value(x) for x in node.attribute}
    version = given.get("plugin_version", b"1").decode()
    if node.op_type != OP or version != PLUGIN_VERSION:
        raise EngineError(
            f"node {node.name} is {DOMAIN}::{node.op_type} version {version}; this version knows "
            f"{OP} version {PLUGIN_VERSION}: export the model again with this version"
        )
    x, values, row_ptr, col_idx, bias = _five_inputs(graph, node)
    blocks, pointers, indices = (graph.arrays[name] for name in (values, row_ptr, col_idx))
    activation = given["activation"].decode()
    in_features = _in_features(graph, node, given)
    if node.name in dense:
        weight = dense_weight(blocks, pointers, indices, in_features=in_features)
        w = graph.constant(f"{node.name}.dense", weight.T)
        return _dense_nodes(graph, node, x, w, bias, activation)
    try:
        packed = pack(blocks, pointers, indices, in_features=in_features)
    except (EngineError, ModelError) as error:
        raise type(error)(f"sparse node {node.name}: {error}") from error
    if graph.arrays[bias].shape != (packed.out_features,):
        raise EngineError(
            f"sparse node {node.name} has {packed.out_features} outputs and a bias of shape "
            f"{graph.arrays[bias].shape}; export the model again with lpvit build"
        )
    names = [
        graph.constant(f"{node.name}.panels", packed.values.view(np.float16)),
        graph.constant(f"{node.name}.rows", packed.rows),
        graph.constant(f"{node.name}.columns", packed.columns),
    ]
    attributes = {
        "block_rows": packed.block_rows,
        "block_cols": packed.block_cols,
        "in_features": packed.in_features,
        "out_features": packed.out_features,
        "activation": activation,
        "plugin_namespace": DOMAIN,
        "plugin_version": PLUGIN_VERSION,
    }
    return [
        helper.make_node(
            OP, [x, *names, bias], list(node.output), name=node.name, domain=DOMAIN, **attributes
        )
    ]


def _five_inputs(graph: Graph, node: Any) -> list[str]:
    inputs = list(node.input)
    if len(inputs) != 5 or any(name not in graph.arrays for name in inputs[1:]):
        raise EngineError(
            f"sparse node {node.name} must have X and four initializers, it has {inputs}; export "
            "the model again with lpvit build"
        )
    return inputs


def _in_features(graph: Graph, node: Any, given: dict[str, Any]) -> int:
    """The input's width, from the shapes in the file: no attribute of the portable node has it."""
    if "in_features" in given:
        return int(given["in_features"])
    for value in (*graph.graph.input, *graph.graph.value_info):
        if value.name == node.input[0]:
            width = value.type.tensor_type.shape.dim[-1].dim_value
            if width > 0:
                return int(width)
    raise EngineError(
        f"the ONNX file does not say how wide the input of sparse node {node.name} is; export the "
        "model again with lpvit build"
    )


def dense_weight(
    values: NDArray[Any], row_ptr: NDArray[Any], col_idx: NDArray[Any], *, in_features: int
) -> NDArray[np.float32]:
    """The whole weight (out_features, in_features) of a sparse node."""
    _, rows, cols = values.shape
    block_rows = len(row_ptr) - 1
    grid = np.zeros((block_rows, in_features // cols, rows, cols), np.float32)
    grid[np.repeat(np.arange(block_rows), np.diff(row_ptr)), col_idx] = values
    return grid.transpose(0, 2, 1, 3).reshape(block_rows * rows, in_features)


def _dense_nodes(graph: Graph, node: Any, x: str, w: str, bias: str, activation: str) -> list[Any]:
    helper = require("onnx.helper")
    out, name = node.output[0], node.name
    linear = f"{name}.linear" if activation == "gelu" else out
    nodes = [
        helper.make_node("MatMul", [x, w], [f"{name}.product"], name=f"{name}/MatMul"),
        helper.make_node("Add", [f"{name}.product", bias], [linear], name=f"{name}/Add"),
    ]
    if activation == "gelu":
        nodes += _gelu(graph, linear, out, f"{name}/Gelu")
    return nodes


def _gelu(graph: Graph, x: str, out: str, name: str) -> list[Any]:
    """x * 0.5 * (1 + erf(x / sqrt 2)), in the order that TensorRT recognizes."""
    helper = require("onnx.helper")
    numbers = {"lpvit_sqrt2": math.sqrt(2.0), "lpvit_one": 1.0, "lpvit_half": 0.5}
    for constant, value in numbers.items():
        if constant not in graph.arrays:
            graph.constant(constant, np.array(value, np.float32))
    steps = (
        ("Div", [x, "lpvit_sqrt2"], f"{out}.scaled"),
        ("Erf", [f"{out}.scaled"], f"{out}.erf"),
        ("Add", [f"{out}.erf", "lpvit_one"], f"{out}.shifted"),
        ("Mul", [x, f"{out}.shifted"], f"{out}.gated"),
        ("Mul", [f"{out}.gated", "lpvit_half"], out),
    )
    return [
        helper.make_node(op, inputs, [output], name=f"{name}.{index}")
        for index, (op, inputs, output) in enumerate(steps)
    ]


def _lowered(graph: Graph, node: Any, *, opset: int) -> list[Any] | None:
    """A node of opset 18 to 20 as opset 17 has it, or 19, which differs in Gelu alone."""
    if node.domain:
        return None
    helper = require("onnx.helper")
    given = {x.name: helper.get_attribute_value(x) for x in node.attribute}
    if node.op_type == "Gelu":
        if given.get("approximate", b"none") != b"none":
            raise EngineError(
                f"{node.name} is an approximate Gelu; export the model with exact ones"
            )
        # Some exporters name no nodes; what a node writes is unique.
        name = node.name or node.output[0]
        return _gelu(graph, node.input[0], node.output[0], name)
    if (
        opset == OPSET
        and node.op_type.startswith("Reduce")
        and node.op_type != "ReduceSum"
        and len(node.input) > 1
    ):
        axes = [int(i) for i in graph.arrays[node.input[1]].reshape(-1)]
        return [
            helper.make_node(
                node.op_type, [node.input[0]], list(node.output), name=node.name, axes=axes,
                keepdims=given.get("keepdims", 1),
            )
        ]  # fmt: skip
    if node.op_type == "Pad" and len(node.input) > 3 and node.input[3]:
        raise EngineError(f"{node.name} pads chosen axes, which opset 17 cannot; pad all of them")
    if node.op_type == "Split" and "num_outputs" in given:
        raise EngineError(f"{node.name} splits by count, which opset 17 cannot; split by sizes")
    return None


def break_two_four(graph: Graph, layer: str, *, int8: bool = False) -> None:
    """Make a dense layer's weight fail the 2:4 test, in one group of four inputs.

    In int8 it must still fail once it is rounded: one step of that output, then. Raises EngineError
    where the file has no such product.
    """
    broken = False
    for node in graph.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.name in (layer, f"{layer}/{node.op_type}"):
            name = next((x for x in node.input if x in graph.arrays), None)
            if name is None:
                continue
            weight = graph.arrays[name].copy()
            columns = weight.T if inputs_last(node) else weight  # a view (in_features, out)
            zeros = np.flatnonzero(columns[:4, 0] == 0)
            step = np.abs(columns[:, 0]).max() / np.float32(127) if int8 else _NOT_ZERO
            columns[zeros, 0] = max(step, _NOT_ZERO)
            graph.replace(name, weight)
            broken = True
    if not broken:
        raise EngineError(
            f"layer {layer} is to run dense and the ONNX file has no product of that name; export "
            "it again with lpvit build"
        )
