"""int8 for the linear layers of a copy: Q/DQ pairs around their products, and nothing else.

One number for all of a layer's inputs, found on the user's images (ranges.py); one for each output
of its weight. Both symmetric: TensorRT wants zero points of 0. Attention, norms, GELU, residuals,
the patch embedding and the classifier stay float16: quantizing them too took a ViT-B from 85 % to
5 % (onnxsim's measurements on an Orin, scripts/nvidia/README.md), the linears alone to 84.5 %.

Scales are float16, which QuantizeLinear and DequantizeLinear take from opset 19 on. In a strongly
typed network onnx-tensorrt gives a DequantizeLinear the type of its scale, so that the products
stay float16 where they are not int8, without casts between the pair and its product, which would
keep TensorRT from fusing them. A weight stays float16 in the file, with a pair of its own: the
parsers before 10.5 take no int8 constants there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_engines.tensorrt.graph import Graph

OPSET, IR_VERSION = 19, 9
_STEPS = 127
_SMALLEST = np.float16(2.0**-20)  # a scale must not be 0, as it would be for outputs pruned whole


def quantize_linears(graph: Graph, ranges: Mapping[str, float]) -> None:
    """Put pairs around the products of the layers in `ranges`, largest |input| by layer, in place.

    Layers that are not products with a constant weight (block-sparse nodes) are left alone.
    """
    graph.rewrite(lambda node: _quantized(graph, node, ranges))


def layer_of(graph: Graph, node: Any) -> str | None:
    """The layer whose product a node is; None for others, such as those of attention."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    if node.input[0] in graph.arrays or node.input[1] not in graph.arrays:
        return None
    name: str = node.name.removesuffix(f"/{node.op_type}")
    return name if graph.arrays[node.input[1]].ndim == 2 else None


def scales(largest: NDArray[Any]) -> NDArray[np.float16]:
    """The float16 steps in which `largest` is 127 at most: rounded up, so that nothing is cut."""
    exact = np.asarray(largest, np.float64) / _STEPS
    half = np.atleast_1d(exact.astype(np.float16))
    low = half.astype(np.float64) < exact
    half[low] = np.nextafter(half[low], np.float16(np.inf))
    return np.maximum(half, _SMALLEST).reshape(exact.shape)


def _quantized(graph: Graph, node: Any, ranges: Mapping[str, float]) -> list[Any] | None:
    layer = layer_of(graph, node)
    if layer is None or layer not in ranges:
        return None
    outputs_first = any(x.name == "transB" and x.i for x in node.attribute)
    axis = 0 if outputs_first else 1
    weight = graph.arrays[node.input[1]]
    by_output = scales(np.abs(weight).max(axis=1 - axis))
    x, w = node.input[0], node.input[1]
    nodes = _pair(graph, x, f"{layer}.x", scales(np.asarray(ranges[layer])))
    nodes += _pair(graph, w, f"{layer}.w", by_output, axis=axis)
    node.input[0], node.input[1] = f"{layer}.x.restored", f"{layer}.w.restored"
    return [*nodes, node]


def _pair(
    graph: Graph, source: str, name: str, steps: NDArray[np.float16], **given: int
) -> list[Any]:
    helper = require("onnx.helper")
    step = graph.constant(f"{name}.scale", steps.astype(np.float32))  # float16 with all the rest
    zero = graph.constant(f"{name}.zero", np.zeros(steps.shape, np.int8))
    whole, restored = f"{name}.int8", f"{name}.restored"
    return [
        helper.make_node(
            "QuantizeLinear", [source, step, zero], [whole], name=f"{name}/Quantize", **given
        ),
        helper.make_node(
            "DequantizeLinear", [whole, step, zero], [restored], name=f"{name}/Dequantize", **given
        ),
    ]
