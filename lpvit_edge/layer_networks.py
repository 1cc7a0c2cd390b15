"""Small networks around one layer in one form, with random weights, to be timed."""

from collections.abc import Iterator

import msgspec
import numpy as np

from lpvit_edge import onnx_nodes
from lpvit_edge.errors import PruningError
from lpvit_edge.pattern import TWO_FOUR_SPARSITY, Pattern, parse_pattern
from lpvit_edge.records import LayerShape

LEAST_COPIES, MOST_COPIES = 4, 24
_MOST_WEIGHT_BYTES = 96 << 20


class LayerForm(msgspec.Struct, frozen=True, kw_only=True):
    """A distinct layer shape in one pattern at one sparsity, and how many layers have the shape."""

    shape: LayerShape
    pattern: str
    sparsity: float
    layers: int
    network_weights: int  # in all prunable layers of the model

    @property
    def copies(self) -> int:
        """How many stand in the network that is timed, each with weights of its own.

        As many as hold the weights of the whole model, within limits of time and memory: a layer
        whose weights are still in the cache from the call before looks faster than it is.
        """
        own = self.shape.in_features * self.shape.out_features
        kept_bytes = 4 * own * (1.0 - self.sparsity)
        within_memory = int(_MOST_WEIGHT_BYTES / max(kept_bytes, 1.0))
        wanted = round(self.network_weights / own)
        return max(LEAST_COPIES, min(wanted, within_memory, MOST_COPIES))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers of this shape, dense, for one image."""
        shape = self.shape
        return self.layers * shape.tokens * shape.in_features * shape.out_features


def layer_forms(
    layers: tuple[LayerShape, ...], patterns: tuple[str, ...], sparsities: tuple[float, ...]
) -> tuple[LayerForm, ...]:
    """Every distinct shape dense, then in its patterns; each group begins with the most work.

    2:4 has one sparsity only. Raises PruningError for the pattern "dense".
    """
    unnamed = [msgspec.structs.replace(layer, name="") for layer in layers]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    dense = [
        LayerForm(
            shape=shape,
            pattern="dense",
            sparsity=0.0,
            layers=unnamed.count(shape),
            network_weights=weights,
        )
        for shape in dict.fromkeys(unnamed)
    ]
    dense.sort(key=lambda form: -form.macs)
    sparse = [form for first in dense for form in _sparse_forms(first, patterns, sparsities)]
    return (*dense, *sparse)


def _sparse_forms(
    dense: LayerForm, patterns: tuple[str, ...], sparsities: tuple[float, ...]
) -> Iterator[LayerForm]:
    for pattern in patterns:
        kind = parse_pattern(pattern).kind
        if kind == "dense":
            raise PruningError(
                "pattern 'dense' is timed without being named; name patterns such as 64x1"
            )
        if parse_pattern(pattern).fits(dense.shape.out_features, dense.shape.in_features):
            for sparsity in sparsities if kind == "block" else (TWO_FOUR_SPARSITY,):
                yield msgspec.structs.replace(dense, pattern=pattern, sparsity=sparsity)


def network(form: LayerForm, *, empty: bool = False) -> bytes:
    """An ONNX file with the form's copies, each with an input and weights of its own.

    With `empty` the layers are left out and their inputs stay.
    """
    shape = form.shape
    generator = np.random.default_rng(0)
    model = onnx_nodes.repeated_layer_model(
        tokens=shape.tokens,
        in_features=shape.in_features,
        out_features=shape.out_features,
        activation=shape.activation,
        copies=[None if empty else _random_weight(form, generator) for _ in range(form.copies)],
    )
    content: bytes = model.SerializeToString()
    return content


def _random_weight(form: LayerForm, generator: np.random.Generator) -> "onnx_nodes.Weight":
    from lpvit_engines.block_sparse import BlockSparseMatrix

    shape = form.shape
    size = (shape.out_features, shape.in_features)
    weight = generator.standard_normal(size, np.float32) / np.float32(shape.in_features**0.5)
    if form.pattern == "dense":
        return weight
    pattern = parse_pattern(form.pattern)
    if pattern.kind == "2:4":
        return weight * _random_two_of_four(size, generator)
    weight *= _random_mask(pattern, size, form.sparsity, generator)
    return BlockSparseMatrix.from_dense(weight, block_rows=pattern.rows, block_cols=pattern.cols)


def _random_two_of_four(
    size: tuple[int, int], generator: np.random.Generator
) -> "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]":
    fours = generator.random((size[0], size[1] // 4, 4))
    return (fours.argsort(2).argsort(2) < 2).reshape(size)


def _random_mask(
    pattern: Pattern, size: tuple[int, int], sparsity: float, generator: np.random.Generator
) -> "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]":
    grid = (size[0] // pattern.rows, size[1] // pattern.cols)
    keep = np.ones(grid[0] * grid[1], np.bool_)
    dropped = round(sparsity * len(keep))
    keep[generator.permutation(len(keep))[:dropped]] = False
    return keep.reshape(grid).repeat(pattern.rows, 0).repeat(pattern.cols, 1)
