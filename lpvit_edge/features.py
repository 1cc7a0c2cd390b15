"""The embedding that the classifier reads, as a second output of the ONNX file.

Whoever watches for drift needs it, and it costs nothing: the network computes it anyway.
"""

from collections.abc import Mapping
from typing import Any

from lpvit_edge.deps import require
from lpvit_edge.errors import ModelError

FEATURES = "features"


def expose_features(proto: Any, heads: Mapping[str, int]) -> None:
    """Add the output "features" (batch, width) to an ONNX model whose nodes are named after layers.

    `heads` are the linear layers that give the answer, each with its in_features; several (a
    distilled model has two) are laid side by side. Without one the model stays as it is. Raises
    ModelError when a head left no node.
    """
    if not heads:
        return
    helper = require("onnx.helper")
    sources = [_input_of(proto.graph, name) for name in heads]
    if len(set(sources)) == 1:
        node = helper.make_node("Identity", sources[:1], [FEATURES], name=FEATURES)
        width = next(iter(heads.values()))
    else:
        node = helper.make_node("Concat", sources, [FEATURES], name=FEATURES, axis=-1)
        width = sum(heads.values())
    proto.graph.node.append(node)
    batch = proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value
    float32 = require("onnx").TensorProto.FLOAT
    shape = helper.make_tensor_value_info(FEATURES, float32, [batch, width])
    proto.graph.output.append(shape)


def _input_of(graph: Any, layer: str) -> str:
    """The value that the first node of a layer reads."""
    for node in graph.node:
        if node.name.partition("/")[0] == layer:
            return str(node.input[0])
    raise ModelError(
        f"the exported graph has no node of the classifier {layer}, so its input cannot be an "
        "output. Export the model without features, or report this with the model"
    )
