"""Linear layers of a network that are stored dense, on the native kernel in int8.

OpenVINO computes in int8 only what was quantised before, from calibration images; the kernel takes
float32 weights and quantises each token by its own numbers. So that a network in int8 is one
throughout, its dense linear layers go the way of its sparse ones, as a single block of each 64
outputs. A layer of one token an image (a classifier's head) stays in float32: it costs nothing.
"""

from collections.abc import Callable, Iterator
from math import gcd
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lpvit_engines.block_sparse import Activation, BlockSparseMatrix

BLOCK_ROWS = 64
Replace = Callable[[Any, BlockSparseMatrix, NDArray[np.float32] | None, Activation], Any]


class Linear(msgspec.Struct, frozen=True, kw_only=True):
    """A product with a constant weight, and the bias and GELU that follow it, nodes of a graph."""

    product: Any
    result: Any  # the last of them
    bias: NDArray[np.float32] | None
    activation: Activation


def replace_dense_layers(model: Any, replace: Replace) -> None:
    """Put what `replace` gives in the place of every dense linear layer; edits `model`.

    replace(x, weight, bias, activation) returns the output of a new node for the output x.
    """
    for linear in list(dense_layers(model)):
        weight = _weight(linear.product)
        rows = gcd(weight.shape[0], BLOCK_ROWS)
        matrix = BlockSparseMatrix.from_dense(weight, block_rows=rows, block_cols=weight.shape[1])
        x, old = linear.product.input_value(0), linear.result.output(0)
        new = replace(x, matrix, linear.bias, linear.activation)
        new.get_node().set_friendly_name(linear.product.get_friendly_name())
        new.set_names(old.get_names())
        for reader in old.get_target_inputs():
            reader.replace_source_output(new)


def dense_layers(model: Any) -> Iterator[Linear]:
    """Every product (..., tokens, in_features) with a constant (in_features, out_features)."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and _is_linear(node):
            yield _with_followers(node)


def _is_linear(product: Any) -> bool:
    x, weight = product.input_value(0), product.input_value(1)
    shape = x.get_partial_shape()
    return (
        weight.get_node().get_type_name() == "Constant"
        and weight.get_element_type().get_type_name() == "f32"
        and len(weight.get_partial_shape()) == 2
        and not product.get_attributes()["transpose_a"]
        and shape.rank.is_static
        and shape.rank.get_length() >= 3
        and shape[-1].is_static
    )


def _with_followers(product: Any) -> Linear:
    result, bias = product, None
    activation: Activation = "none"
    add = _only_reader(product, "Add")
    if add is not None:
        other = next(v.get_node() for v in add.input_values() if v.get_node() != product)
        if _is_bias(other, int(product.get_output_partial_shape(0)[-1].get_length())):
            result, bias = add, np.array(other.data, np.float32).reshape(-1)
    gelu = _only_reader(result, "Gelu")
    if gelu is not None and gelu.get_attributes()["approximation_mode"].lower() == "erf":
        result, activation = gelu, "gelu"
    return Linear(product=product, result=result, bias=bias, activation=activation)


def _is_bias(node: Any, out_features: int) -> bool:
    if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
        return False
    shape = tuple(node.get_output_shape(0))
    return shape[-1:] == (out_features,) and all(size == 1 for size in shape[:-1])


def _only_reader(node: Any, kind: str) -> Any | None:
    """The one node that reads the output of `node`, where it is of that kind."""
    readers = list(node.output(0).get_target_inputs())
    if len(readers) != 1 or readers[0].get_node().get_type_name() != kind:
        return None
    return readers[0].get_node()


def _weight(product: Any) -> NDArray[np.float32]:
    """(out_features, in_features)."""
    data = np.asarray(product.input_value(1).get_node().data)
    is_transposed = product.get_attributes()["transpose_b"]
    return np.ascontiguousarray(data if is_transposed else data.T)
