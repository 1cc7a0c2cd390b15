"""The sparse node of the portable ONNX file, and small models around one layer.

`lpvit::BlockSparseLinear(X, values, row_ptr, col_idx, bias) -> Y` with attributes block_rows,
block_cols, out_features, activation ("none" or "gelu"), plugin_namespace and plugin_version.
X (..., in_features); values (blocks, block_rows, block_cols); row_ptr int32
(out_features / block_rows + 1); col_idx int32 (blocks); Y (..., out_features).

The file also carries a model-local function of that name made of standard operators, so that any
ONNX runtime computes the right answer, slowly.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from lpvit_edge.deps import require

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from lpvit_engines.block_sparse import BlockSparseMatrix

    Weight: TypeAlias = NDArray[np.float32] | BlockSparseMatrix

DOMAIN, OP = "lpvit", "BlockSparseLinear"
OPSET = 20  # the first with Gelu as one operator
IR_VERSION = 9  # the oldest that knows model-local functions with opset 20

# Dense weight = the blocks scattered into (block rows, block columns, R, C), then laid out flat.
_BODY = """
<opset_import: ["" : 20], domain: "lpvit">
BlockSparseLinear
    <block_rows, block_cols, out_features, activation, plugin_namespace, plugin_version>
    (X, values, row_ptr, col_idx, bias) => (Y)
{
    rows = Constant <value_int: int = @block_rows> ()
    cols = Constant <value_int: int = @block_cols> ()
    outs = Constant <value_int: int = @out_features> ()
    chosen = Constant <value_string: string = @activation> ()
    zero = Constant <value: tensor = int64 {0}> ()
    one = Constant <value: tensor = int64 {1}> ()
    minus_one = Constant <value: tensor = int64[1] {-1}> ()
    axis_0 = Constant <value: tensor = int64[1] {0}> ()
    axis_1 = Constant <value: tensor = int64[1] {1}> ()
    last = Constant <value: tensor = int64[1] {-1}> ()
    x_shape = Shape (X)
    ins = Gather (x_shape, minus_one)
    outs_1 = Unsqueeze (outs, axis_0)
    rows_1 = Unsqueeze (rows, axis_0)
    cols_1 = Unsqueeze (cols, axis_0)
    row_blocks = Div (outs_1, rows_1)
    col_blocks = Div (ins, cols_1)
    ends_all = Cast <to: int = 7> (row_ptr)
    big = Constant <value: tensor = int64[1] {2147483647}> ()
    one_1 = Constant <value: tensor = int64[1] {1}> ()
    ends = Slice (ends_all, one_1, big, axis_0)
    count_1 = Shape (col_idx)
    count = Squeeze (count_1, axis_0)
    index = Range (zero, count, one)
    index_2 = Unsqueeze (index, axis_1)
    ends_2 = Unsqueeze (ends, axis_0)
    passed = GreaterOrEqual (index_2, ends_2)
    passed_int = Cast <to: int = 7> (passed)
    row_of = ReduceSum <keepdims: int = 1> (passed_int, axis_1)
    col_64 = Cast <to: int = 7> (col_idx)
    col_of = Unsqueeze (col_64, axis_1)
    place = Concat <axis: int = 1> (row_of, col_of)
    grid_shape = Concat <axis: int = 0> (row_blocks, col_blocks, rows_1, cols_1)
    grid = ConstantOfShape (grid_shape)
    filled = ScatterND (grid, place, values)
    by_row = Transpose <perm: ints = [0, 2, 1, 3]> (filled)
    flat_shape = Concat <axis: int = 0> (outs_1, ins)
    weight = Reshape (by_row, flat_shape)
    weight_t = Transpose <perm: ints = [1, 0]> (weight)
    product = MatMul (X, weight_t)
    linear = Add (product, bias)
    gelu_name = Constant <value_string: string = "gelu"> ()
    is_gelu = Equal (chosen, gelu_name)
    activated = Gelu (linear)
    Y = Where (is_gelu, activated, linear)
}
"""


def function_proto() -> Any:
    """The model-local function: standard operators only."""
    return require("onnx.parser").parse_function(_BODY)


def sparse_attributes(matrix: "BlockSparseMatrix", *, activation: str) -> dict[str, Any]:
    """Attributes of the node for one matrix."""
    _, rows, cols = matrix.values.shape
    return {
        "block_rows": int(rows),
        "block_cols": int(cols),
        "out_features": int(matrix.out_features),
        "activation": activation,
        "plugin_namespace": "lpvit",
        "plugin_version": "1",
    }


def repeated_layer_model(
    *,
    tokens: int,
    in_features: int,
    out_features: int,
    activation: str,
    copies: "list[Weight | None]",
) -> Any:
    """A model that gives each of several layers an input of its own, made from (1, tokens, K).

    Each copy is a weight (out_features, in_features), dense or block-sparse, or None for no layer.
    Before each stands a layer normalization, as in a network: a layer that found its input where
    the copy before it had left it would look faster than it is. Of every result one number goes to
    the output, so that no layer can be left out and little is copied.
    """
    onnx = require("onnx")
    helper, numpy_helper = require("onnx.helper"), require("onnx.numpy_helper")
    float_type = onnx.TensorProto.FLOAT
    nodes: list[Any] = []
    initializers: list[Any] = []

    def constant(name: str, value: "NDArray[Any]") -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    for name, value in (("first", 0), ("second", 1), ("axis_1", 1), ("axis_2", 2)):
        constant(name, np.array([value], np.int64))
    bias = constant("bias", np.linspace(-1, 1, out_features, dtype=np.float32))
    shift = constant("shift", np.zeros(in_features, np.float32))
    for index, weight in enumerate(copies):
        # Unequal scales, or the normalizations would be merged into one.
        scale = constant(f"scale{index}", np.full(in_features, 1 + index / 64, np.float32))
        result = f"x{index}"
        nodes.append(helper.make_node("LayerNormalization", ["x", scale, shift], [result], axis=-1))
        if weight is not None:
            result = _layer_nodes(nodes, constant, index, weight, bias, activation)
        for slice_of, out, axis in ((result, "r", "axis_1"), (f"r{index}", "p", "axis_2")):
            inputs = [slice_of, "first", "second", axis]
            nodes.append(helper.make_node("Slice", inputs, [f"{out}{index}"]))
    picked = [f"p{index}" for index in range(len(copies))]
    nodes.append(helper.make_node("Concat", picked, ["y"], axis=2))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", float_type, [1, tokens, in_features])],
        [helper.make_tensor_value_info("y", float_type, [1, 1, len(copies)])],
        initializers,
    )
    return finish(helper.make_model(graph, opset_imports=_opsets(helper), ir_version=IR_VERSION))


def _layer_nodes(
    nodes: list[Any],
    constant: Any,
    index: int,
    weight: "Weight",
    bias: str,
    activation: str,
) -> str:
    helper = require("onnx.helper")
    source, out = f"x{index}", f"y{index}"
    if isinstance(weight, np.ndarray):
        w = constant(f"w{index}", weight.T)
        nodes.append(helper.make_node("MatMul", [source, w], [f"m{index}"], name=f"layer{index}"))
        nodes.append(helper.make_node("Add", [f"m{index}", bias], [out]))
        if activation != "gelu":
            return out
        nodes.append(helper.make_node("Gelu", [out], [f"g{index}"]))
        return f"g{index}"
    parts = [
        constant(f"{name}{index}", getattr(weight, name))
        for name in ("values", "row_ptr", "col_idx")
    ]
    nodes.append(
        helper.make_node(
            OP,
            [source, *parts, bias],
            [out],
            name=f"layer{index}",
            domain=DOMAIN,
            **sparse_attributes(weight, activation=activation),
        )
    )
    return out


def _opsets(helper: Any) -> list[Any]:
    return [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]


def finish(model: Any) -> Any:
    """Add the function when a node needs it, and check the whole model."""
    onnx = require("onnx")
    if any(node.op_type == OP for node in model.graph.node) and not len(model.functions):
        model.functions.append(function_proto())
    onnx.checker.check_model(model, full_check=False)
    return model
