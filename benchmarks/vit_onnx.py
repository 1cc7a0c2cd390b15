"""DeiT as ONNX with random weights, and its twin in which the linear layers are block sparse.

Only speed is measured on these, so weights and masks are random: no trained accuracy is implied.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from lpvit_engines.block_sparse import BlockSparseMatrix

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One linear layer: Y (tokens, out_features) = X (tokens, in_features) W^T."""

    name: str
    in_features: int
    out_features: int
    stored: int
    """Weights that are kept."""


def export_dense(model: str, path: Path) -> None:
    """Write timm's model with random weights, batch 1, 224 px."""
    _export(_random_network(model), path, opset=20)


def export_unstructured(model: str, path: Path, *, sparsity: float) -> None:
    """The same with single weights of the linear layers in its blocks zeroed at random.

    In opset 16, and with attention as products and a softmax: older runtimes read nothing newer.
    """
    import torch

    network = _random_network(model)
    generator = torch.Generator().manual_seed(SEED)
    for name, module in network.named_modules():
        if isinstance(getattr(module, "fused_attn", None), bool):
            module.fused_attn = False
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            kept = torch.rand(module.weight.shape, generator=generator) >= sparsity
            module.weight.data *= kept
    _export(network, path, opset=16)


def _random_network(model: str) -> Any:
    import timm
    import torch

    torch.manual_seed(SEED)
    network = timm.create_model(model, pretrained=False).eval()
    for parameter in network.parameters():  # equal tensors would be exported as one
        torch.nn.init.normal_(parameter, std=0.02)
    return network


def _export(network: Any, path: Path, *, opset: int) -> None:
    import torch

    image = torch.zeros(1, 3, 224, 224)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates this exporter; timm's models pass it
        torch.onnx.export(network, (image,), str(path), opset_version=opset, dynamo=False)


def write_sparse(dense: Path, path: Path, *, block: tuple[int, int], sparsity: float) -> list[Gemm]:
    """Write `dense` with every linear layer of its blocks as a sparse node, random blocks kept.

    The GELU that follows a layer moves into its node. Returns the layers.
    """
    model = onnx.load(dense)
    graph = model.graph
    rng = np.random.default_rng(SEED)
    arrays = {i.name: i for i in graph.initializer}
    consumers = {name: node for node in graph.node for name in node.input}
    gemms, replaced = [], []
    for node in list(graph.node):
        if node.op_type != "MatMul" or node.input[1] not in arrays:
            continue
        weight = numpy_helper.to_array(arrays[node.input[1]]).T
        matrix = prune_at_random(weight, block=block, sparsity=sparsity, rng=rng)
        add = consumers[node.output[0]]
        bias = next(name for name in add.input if name in arrays)
        gelu = consumers[add.output[0]]
        last = gelu if gelu.op_type == "Gelu" else add
        sparse = sparse_node(graph, node, bias, matrix, last)
        graph.node.insert(list(graph.node).index(node), sparse)
        replaced += [node, add] if last is add else [node, add, gelu]
        graph.initializer.remove(arrays[node.input[1]])
        gemms.append(
            Gemm(
                name=node.name,
                in_features=matrix.in_features,
                out_features=matrix.out_features,
                stored=int(matrix.values.size),
            )
        )
    for node in replaced:
        graph.node.remove(node)
    model.opset_import.append(helper.make_opsetid("lpvit", 1))
    onnx.save(model, path)
    return gemms


def prune_at_random(
    weight: NDArray[np.float32],
    *,
    block: tuple[int, int],
    sparsity: float,
    rng: np.random.Generator,
) -> BlockSparseMatrix:
    """Keep the same number of blocks in each block row, drawn at random."""
    R, C = block
    rows, columns = weight.shape[0] // R, weight.shape[1] // C
    kept = round(columns * (1 - sparsity))
    mask = np.argsort(rng.random((rows, columns)), axis=1) < kept
    pruned = weight * np.kron(mask, np.ones(block, np.float32))
    return BlockSparseMatrix.from_dense(pruned, block_rows=R, block_cols=C)


def sparse_node(
    graph: Any, node: Any, bias: str, matrix: BlockSparseMatrix, last: Any
) -> onnx.NodeProto:
    """The node that stands for `node` up to `last`; its initializers are added to the graph."""
    names = [f"{node.name}.{field}" for field in ("values", "row_ptr", "col_idx")]
    for name, array in zip(names, (matrix.values, matrix.row_ptr, matrix.col_idx), strict=True):
        graph.initializer.append(numpy_helper.from_array(array, name))
    return helper.make_node(
        "BlockSparseLinear",
        [node.input[0], *names, bias],
        [last.output[0]],
        name=node.name,
        domain="lpvit",
        block_rows=matrix.block_rows,
        block_cols=matrix.block_cols,
        out_features=matrix.out_features,
        activation="gelu" if last.op_type == "Gelu" else "none",
    )
