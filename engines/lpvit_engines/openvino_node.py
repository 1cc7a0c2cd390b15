"""`lpvit::BlockSparseLinear` for OpenVINO: from the ONNX node to an operator that runs the kernel.

The weights leave OpenVINO's graph here: they are packed once into the kernel's layout and the
operator keeps only X as its input, so nothing stays in memory twice.

The operator exists twice. The native one (native/openvino_node.cpp) costs 3 to 4 us a call and
needs no Python, but loads only into the OpenVINO it was compiled for. The one in Python costs 12 us
and waits for the interpreter lock in every node: with one busy Python thread beside it, a model of
32 sparse nodes took 205 ms instead of 8, and 17 ms with the native operator.
"""

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.block_sparse import Activation, BlockSparseMatrix
from lpvit_engines.native import PackedLayer, Precision
from lpvit_engines.native_library import refuse_stale
from lpvit_engines.openvino_attention import fuse_attention
from lpvit_engines.openvino_int8 import replace_dense_layers

_LOG = logging.getLogger(__name__)
NATIVE_OPERATOR = Path(__file__).parent / "_openvino_node.so"
NODE = "BlockSparseLinear"
DOMAIN = "lpvit"


class SparseNodes:
    """The sparse nodes of one model while it is read: its extension, its layers, its error.

    OpenVINO turns any exception of a conversion into text of its own, so the first EngineError is
    kept in `refusal`, for the caller to raise.
    """

    def __init__(self, *, thread_table: int | None, precision: Precision = "float32") -> None:
        self.thread_table = thread_table
        self.precision: Precision = precision
        self.packed: list[PackedLayer] = []
        self.refusal: EngineError | None = None

    def extension(self) -> Any:
        """What openvino.Core.add_extension takes."""
        frontend = require("openvino.frontend.onnx")
        return frontend.ConversionExtension(NODE, DOMAIN, self._convert)

    def join(self, model: Any) -> None:
        """Let sparse nodes in bf16 that follow each other (fc1, fc2) hand their numbers on as they
        are, and bear the names that the reader gave to the conversions behind them."""
        if self.precision != "bf16":
            return
        for wide in [op for op in model.get_ordered_ops() if op.get_type_name() == "Convert"]:
            source = wide.input_value(0)
            if source.get_node().get_type_name() != NODE:
                continue
            source.get_node().set_friendly_name(wide.get_friendly_name())
            for reader in wide.output(0).get_target_inputs():
                narrow = reader.get_node()
                if (
                    narrow.get_type_name() == "Convert"
                    and narrow.get_element_type().get_type_name() == "bf16"
                ):
                    for after in narrow.output(0).get_target_inputs():
                        after.replace_source_output(source)

    def layers(self, model: Any) -> dict[str, PackedLayer]:
        """The model's packed layers by the names of their nodes (of its output, for the last)."""
        by_address = {layer.addresses["layer"]: layer for layer in self.packed}
        operators = (op for op in model.get_ordered_ops() if op.get_type_name() == NODE)
        return {op.get_friendly_name(): by_address[_layer_address(op)] for op in operators}

    def fuse_attention(self, model: Any) -> dict[str, str]:
        """Attention on the native kernel where the model has sparse layers: kernel by node.

        A network without sparse layers stays OpenVINO's own: it is what they are held against.
        """
        # In bf16 OpenVINO's own attention is faster: the kernel's is float32, between conversions.
        is_ours = self.packed and self.precision != "bf16"
        factory = native_operators() if is_ours else None
        if factory is None:
            return {}
        return fuse_attention(
            model, factory, thread_table=self.thread_table, precision=self.precision
        )

    def close(self) -> None:
        for layer in self.packed:
            layer.close()

    def quantise(self, model: Any) -> None:
        """In int8, the linear layers that are stored dense go the way of the sparse ones."""
        if self.precision == "int8":
            replace_dense_layers(model, self._dense_operator)

    def _convert(self, node: Any) -> Any:
        try:
            layer = _read_layer(node, thread_table=self.thread_table, precision=self.precision)
        except EngineError as error:
            self.refusal = self.refusal or error
            raise
        self.packed.append(layer)
        return self._operator(node.get_input(0), layer)

    def _dense_operator(
        self,
        x: Any,
        matrix: BlockSparseMatrix,
        bias: NDArray[np.float32] | None,
        activation: Activation,
    ) -> Any:
        layer = PackedLayer(
            matrix,
            bias=bias,
            activation=activation,
            threads=self.thread_table,
            precision=self.precision,
        )
        self.packed.append(layer)
        return self._operator(x, layer)[0]

    def _operator(self, x: Any, layer: PackedLayer) -> Any:
        """Outputs of the operator that runs a layer on the output x of another node."""
        factory = native_operators()
        if factory is None:
            return _operator_class(layer)([x]).outputs()
        attributes = {**layer.addresses, "out_features": layer.out_features}
        if self.precision == "bf16":
            return _in_bfloat16(factory, x, attributes)
        return factory.create(NODE, [x], attributes).outputs()


@cache
def native_operators() -> Any | None:
    """A factory of native operators, or None with a warning where they do not load."""
    try:
        factory = require("openvino.utils.node_factory").NodeFactory()
        factory.add_extension(str(NATIVE_OPERATOR))
        refuse_stale(ctypes.CDLL(str(NATIVE_OPERATOR)), NATIVE_OPERATOR)
    except (RuntimeError, EnvironmentUnfitError) as error:
        _LOG.warning(
            "sparse nodes run through Python, slower beside busy Python threads: %s is absent or "
            "was compiled for another OpenVINO or other sources. Install lpvit-edge again (%s)",
            NATIVE_OPERATOR.name,
            error,
        )
        return None
    return factory


def _in_bfloat16(factory: Any, x: Any, attributes: dict[str, int]) -> Any:
    """The operator from and to bfloat16, so that OpenVINO need not widen what it holds narrow.

    In a graph that runs in bf16 the two conversions vanish; an operator of float32 would be put
    between two real ones, 3 to 6 % of DeiT-B's time at 80 % sparsity.
    """
    convert = require("openvino").opset13.convert
    node = factory.create(NODE, [convert(x, "bf16").output(0)], attributes)
    return convert(node.output(0), "f32").outputs()


def _layer_address(operator: Any) -> int:
    return int(operator.get_attributes()["layer"])


def _read_layer(node: Any, *, thread_table: int | None, precision: Precision) -> PackedLayer:
    """Validate and pack the node's initializers."""
    block = (int(node.get_attribute("block_rows")), int(node.get_attribute("block_cols")))
    row_ptr = _initializer(node, 2, "row_ptr")
    values = _initializer(node, 1, "values")
    col_idx = _initializer(node, 3, "col_idx")
    if values.ndim == col_idx.ndim == 0 and not row_ptr.any():
        # OpenVINO's reader makes a scalar of an initializer without elements.
        values, col_idx = np.empty((0, *block), np.float32), np.empty(0, np.int32)
    if values.shape[1:] != block:
        raise EngineError(
            f"values has shape {values.shape}, but the node declares blocks of "
            f"{block[0]}x{block[1]}. Export the model again"
        )
    matrix = BlockSparseMatrix(
        values=values,
        row_ptr=row_ptr,
        col_idx=col_idx,
        in_features=_in_features(node),
        out_features=int(node.get_attribute("out_features")),
    )
    return PackedLayer(
        matrix,
        bias=_initializer(node, 4, "bias") if node.get_input_size() > 4 else None,
        activation=node.get_attribute("activation"),
        threads=thread_table,
        precision=precision,
    )


def _in_features(node: Any) -> int:
    """Of x, which the kernel will read as float32 of that width."""
    element, shape = node.get_input(0).get_element_type(), node.get_input(0).get_partial_shape()
    if element.get_type_name() != "f32":
        raise EngineError(
            f"its input is {element.get_type_name()}; the node takes float32. Export the model in "
            "float32: the engine's precision is chosen when it is loaded"
        )
    if shape.rank.is_dynamic or shape.rank.get_length() < 1 or shape[-1].is_dynamic:
        raise EngineError(f"the last dimension of its input {shape} is not fixed; export it fixed")
    return int(shape[-1].get_length())


def _initializer(node: Any, index: int, name: str) -> NDArray[Any]:
    source = node.get_input(index).get_node()
    if source.get_type_name() != "Constant":
        raise EngineError(
            f"{name} comes from a {source.get_type_name()}; it must be an initializer"
        )
    return np.asarray(source.data)


def _operator_class(packed: PackedLayer) -> Any:
    """An operator class for one layer.

    One class a layer, since OpenVINO clones operators by their class and asks for the output shape
    while the constructor still runs: what they need must hang on the class.
    """
    openvino = require("openvino")
    in_features, out_features = packed.in_features, packed.out_features

    class BlockSparseLinear(openvino.Op):  # type: ignore[misc, name-defined]
        def __init__(self, inputs: Any = None) -> None:
            super().__init__(self, *([] if inputs is None else [inputs]))
            if inputs is not None:
                self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            shape = list(self.get_input_partial_shape(0))
            shape[-1] = openvino.Dimension(out_features)
            self.set_output_type(0, openvino.Type.f32, openvino.PartialShape(shape))

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return type(self)(inputs)

        def has_evaluate(self) -> bool:
            return True

        def visit_attributes(self, visitor: Any) -> bool:
            # OpenVINO merges operators of one type on one input whose attributes are equal: without
            # this, a query and a key layer would silently become the same.
            visitor.on_attributes({"layer": packed.addresses["layer"]})
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            # Every microsecond here is paid once per node. Setting the output's shape costs 20 us,
            # all the rest 10 us, so it is set only where OpenVINO could not know it beforehand.
            x = inputs[0].data
            y = outputs[0].data
            tokens = x.size // in_features
            if y.size != tokens * out_features:
                outputs[0].shape = [*x.shape[:-1], out_features]
                y = outputs[0].data
            packed.run(x.ctypes.data, tokens, y.ctypes.data)
            return True

    return BlockSparseLinear
