"""Which layers of a portable ONNX model are sparse, and in which pattern."""

from typing import Any

from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_engines.tensorrt.graph import Graph

DOMAIN = "lpvit"  # of the project's own ONNX operators


def inputs_last(node: Any) -> bool:
    """Whether the weight is (out, in): a Gemm with transB."""
    return any(x.name == "transB" and x.i for x in node.attribute)


def is_two_four(weight: NDArray[Any]) -> bool:
    """Whether each 4 neighbouring inputs of a weight (in_features, out_features) keep at most 2,
    and the weight is not simply empty."""
    inputs, outputs = weight.shape
    if inputs % 4 or not weight.any():
        return False
    kept = (weight.reshape(inputs // 4, 4, outputs) != 0).sum(axis=1)
    return bool((kept <= 2).all())


def sparse_layers(portable: Any) -> dict[str, str]:
    """Pattern by layer of a portable model: block nodes, and products whose weight is 2:4."""
    graph = Graph(portable)
    helper = require("onnx.helper")
    found = {}
    for node in portable.graph.node:
        if node.domain == DOMAIN:
            given = {x.name: helper.get_attribute_value(x) for x in node.attribute}
            found[node.name] = f"{given['block_rows']}x{given['block_cols']}"
        elif node.op_type in ("MatMul", "Gemm"):
            weight = next((graph.arrays[x] for x in node.input if x in graph.arrays), None)
            if weight is not None and weight.ndim == 2:
                inputs_first = weight.T if inputs_last(node) else weight
                if is_two_four(inputs_first):
                    found[node.name.removesuffix(f"/{node.op_type}")] = "2:4"
    return found
