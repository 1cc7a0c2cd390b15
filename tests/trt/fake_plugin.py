"""lpvit::BlockSparseLinear by ONNX's own operators, from the weights as the kernel reads them."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lpvit_engines.cuda.packing import PANEL_COLS


def without_plugins(copy: Any) -> Any:
    """The model with each plugin's node replaced; it computes in float32 what the kernel does."""
    model = onnx.ModelProto()
    model.CopyFrom(copy)
    arrays = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    nodes = [made for node in model.graph.node for made in _expanded(model, node, arrays)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    standard = [x for x in model.opset_import if not x.domain]
    del model.opset_import[:]
    model.opset_import.extend(standard)
    return model


def unpacked(
    panels: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any], given: dict[str, Any]
) -> NDArray[np.float32]:
    """The weight (out_features, in_features), read as the kernel reads it."""
    height, width = given["block_rows"], given["block_cols"]
    segments = PANEL_COLS // width
    weight = np.zeros((given["out_features"], given["in_features"]), np.float32)
    for block_row, first, end, _ in rows:
        band = weight[block_row * height : (block_row + 1) * height]
        for segment in range(first * segments, end * segments):
            panel, begin = segment // segments, segment % segments * width
            column = columns[segment]  # a padding segment of zeros points at column 0
            band[:, column : column + width] += panels[panel, :, begin : begin + width]
    return weight


def _expanded(model: Any, node: Any, arrays: dict[str, NDArray[Any]]) -> list[Any]:
    if not node.domain:
        return [node]
    given = {x.name: helper.get_attribute_value(x) for x in node.attribute}
    x, panels, rows, columns, bias = node.input
    weight = unpacked(arrays[panels], arrays[rows], arrays[columns], given)
    name, out = node.name, node.output[0]
    constants: dict[str, Any] = {"w": weight.T, "b": arrays[bias].astype(np.float32)}
    constants |= {"half": np.float32(0.5), "one": np.float32(1), "root": np.float32(2**0.5)}
    for key, value in constants.items():
        model.graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(value), f"{name}.{key}")
        )
    steps = [("Cast", [x], "x"), ("MatMul", ["x", "w"], "xw"), ("Add", ["xw", "b"], "sum")]
    if given["activation"] == b"gelu":
        steps += [
            ("Div", ["sum", "root"], "scaled"), ("Erf", ["scaled"], "erf"),
            ("Add", ["erf", "one"], "shifted"), ("Mul", ["sum", "shifted"], "gated"),
            ("Mul", ["gated", "half"], "result"),
        ]  # fmt: skip
    made = [
        helper.make_node(op, [i if i == x else f"{name}.{i}" for i in inputs], [f"{name}.{o}"])
        for op, inputs, o in steps
    ]
    made[0].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    last = made[-1].output[0]
    return [*made, helper.make_node("Cast", [last], [out], to=TensorProto.FLOAT16)]
