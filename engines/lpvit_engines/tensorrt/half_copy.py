"""Float16 for a whole ONNX graph, LayerNormalization excepted."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import ModelError

# Computed in float32: their sums and squares leave float16's range (65504) on trained ViTs.
_IN_SINGLE = frozenset({"LayerNormalization"})
_FLOAT, _HALF = 1, 10  # onnx.TensorProto.FLOAT and FLOAT16


def to_half(model: Any) -> None:
    """Turn every float32 tensor inside the graph into float16, in place.

    Inputs and outputs of the model stay float32, with casts at the edges. Raises ModelError for a
    weight that float16 cannot hold.
    """
    graph = model.graph
    single = _constants_of_single(graph)
    _halve_initializers(graph, single)
    inputs, outputs = _halves(graph.input), _halves(graph.output)
    nodes: list[Any] = [_cast(name, half, _HALF) for name, half in inputs.items()]
    for node in graph.node:
        _halve_attributes(node)
        _rename(node.input, inputs)
        if node.op_type in _IN_SINGLE:
            nodes.extend(_surrounded(node))
        else:
            nodes.append(node)
    for node in nodes:
        _rename(node.output, outputs)
        _rename(node.input, outputs)
    nodes += [_cast(half, name, _FLOAT) for name, half in outputs.items()]
    del graph.node[:]
    graph.node.extend(nodes)


def _constants_of_single(graph: Any) -> set[str]:
    """Constants of the operators that stay float32."""
    return {name for n in graph.node if n.op_type in _IN_SINGLE for name in n.input[1:] if name}


def _halve_initializers(graph: Any, single: set[str]) -> None:
    """Halve them; one that a float32 operator reads is kept beside as NAME.single."""
    numpy_helper = require("onnx.numpy_helper")
    for initializer in list(graph.initializer):
        if initializer.data_type != _FLOAT:
            continue
        array = numpy_helper.to_array(initializer)
        if initializer.name in single:
            graph.initializer.append(numpy_helper.from_array(array, _single_name(initializer.name)))
        halved = numpy_helper.from_array(_half(array, initializer.name), initializer.name)
        initializer.CopyFrom(halved)


def _single_name(name: str) -> str:
    return f"{name}.single"


def _half(array: NDArray[Any], name: str) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        worst = float(array.flat[int(np.argmax(np.abs(array)))])
        raise ModelError(
            f"{name} holds {worst:g}, which float16 cannot (its largest is 65504). Look for NaN in "
            "the checkpoint, or run this model on another engine"
        )
    return half


def _halves(edges: Any) -> dict[str, str]:
    """The float16 name of each float32 input or output of the model."""
    return {x.name: f"{x.name}.half" for x in edges if x.type.tensor_type.elem_type == _FLOAT}


def _rename(names: Any, new: dict[str, str]) -> None:
    for index, name in enumerate(names):
        if name in new:
            names[index] = new[name]


def _cast(source: str, target: str, to: int) -> Any:
    helper = require("onnx.helper")
    return helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=to)


def _surrounded(node: Any) -> list[Any]:
    """A float32 operator between casts, its constants in float32."""
    x, y = node.input[0], node.output[0]
    node.input[0] = f"{y}.in32"
    for index in range(1, len(node.input)):
        if node.input[index]:
            node.input[index] = _single_name(node.input[index])
    node.output[0] = f"{y}.out32"
    return [_cast(x, f"{y}.in32", _FLOAT), node, _cast(f"{y}.out32", y, _HALF)]


def _halve_attributes(node: Any) -> None:
    numpy_helper = require("onnx.numpy_helper")
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
            attribute.i = _HALF
        elif attribute.name == "value" and attribute.t.data_type == _FLOAT:
            array = numpy_helper.to_array(attribute.t)
            attribute.t.CopyFrom(numpy_helper.from_array(_half(array, node.name)))
