"""From a pruned torch model to the portable ONNX file that design and engines agree on."""

import ast
import contextlib
import copy
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from lpvit_edge import onnx_nodes
from lpvit_edge.deps import require
from lpvit_edge.errors import ModelError
from lpvit_edge.features import expose_features
from lpvit_edge.files import replace_atomic
from lpvit_edge.layers import Walk, example_images
from lpvit_edge.pattern import Pattern
from lpvit_edge.shrink import shrink

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lpvit_engines.block_sparse import BlockSparseMatrix
    from lpvit_engines.tensorrt.plan_file import Compared as PlanCompared


class _SparseNode(nn.Module):
    """Stands in for a linear layer while the model is exported; it computes nothing."""

    def __init__(self, layer: nn.Linear, matrix: "BlockSparseMatrix", activation: str) -> None:
        super().__init__()
        self.values = nn.Buffer(torch.from_numpy(matrix.values.copy()))
        self.row_ptr = nn.Buffer(torch.from_numpy(matrix.row_ptr.copy()))
        self.col_idx = nn.Buffer(torch.from_numpy(matrix.col_idx.copy()))
        bias = torch.zeros(matrix.out_features) if layer.bias is None else layer.bias.detach()
        self.bias = nn.Buffer(bias.clone())
        self.attributes = onnx_nodes.sparse_attributes(matrix, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        node: Tensor = torch.onnx.ops.symbolic(
            f"{onnx_nodes.DOMAIN}::{onnx_nodes.OP}",
            (x, self.values, self.row_ptr, self.col_idx, self.bias),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.attributes["out_features"]),
            version=1,
        )
        return node


def export_onnx(
    model: nn.Module,
    walk: Walk,
    patterns: Mapping[str, Pattern],
    path: Path,
    *,
    image_size: int,
    batch: int = 1,
    shrunk: bool = False,
) -> tuple[str, ...]:
    """Write `model` to `path`, its layers in `patterns` as sparse nodes, the rest dense.

    Every weight of a sparse layer's block that is not all zero is stored. Input "images"
    (batch, 3, image_size, image_size), outputs "logits" and, where a linear layer gives them, the
    "features" (batch, width) that it reads. With `shrunk`, neurons, heads and layers that no
    longer compute anything are left out (lpvit_edge.shrink); what went is returned. The file is
    whole or absent. Raises ModelError when torch cannot export the model.
    """
    replaced = copy.deepcopy(model).eval()
    gone = shrink(replaced, walk, patterns, image_size=image_size) if shrunk else ()
    activations = {layer.name: layer.activation for layer in walk.layers}
    for name, pattern in patterns.items():
        if pattern.kind == "block" and isinstance(replaced.get_submodule(name), nn.Linear):
            _replace(replaced, name, pattern, activations[name], walk.gelu_after)
    proto = _export(replaced, example_images(image_size, batch=batch))
    _name_nodes_after_layers(proto)
    expose_features(proto, walk.heads)
    onnx_nodes.finish(proto)
    onnx = require("onnx")
    replace_atomic(path, lambda temporary: onnx.save(proto, temporary))
    return gone


def _replace(
    model: nn.Module, name: str, pattern: Pattern, activation: str, gelu_after: Mapping[str, str]
) -> None:
    from lpvit_engines.block_sparse import BlockSparseMatrix

    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    matrix = BlockSparseMatrix.from_dense(
        layer.weight.detach().numpy(), block_rows=pattern.rows, block_cols=pattern.cols
    )
    model.set_submodule(name, _SparseNode(layer, matrix, activation))
    if activation == "gelu":
        model.set_submodule(gelu_after[name], nn.Identity())


def _export(model: nn.Module, images: Tensor) -> Any:
    require("onnxscript")
    try:
        # The exporter talks on stdout and warns about its own internals; neither is the user's.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                opset_version=onnx_nodes.OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ModelError(
            f"torch cannot export {type(model).__name__} to ONNX: {error}. The model must trace "
            "without data-dependent control flow"
        ) from error
    assert program is not None
    return program.model_proto


def _name_nodes_after_layers(proto: Any) -> None:
    """Give each node the name of the module it came from: "blocks.3.mlp.fc1/MatMul"."""
    used: dict[str, int] = {}
    for node in proto.graph.node:
        module = _module_of(node)
        if node.op_type == onnx_nodes.OP:
            # Not after its weights: the exporter keeps equal ones, such as none at all, once.
            assert module is not None
            node.name = module
        elif module:
            name = f"{module}/{node.op_type}"
            used[name] = used.get(name, 0) + 1
            node.name = name if used[name] == 1 else f"{name}_{used[name]}"
        del node.metadata_props[:]  # it names files of this machine
    del proto.metadata_props[:]
    proto.doc_string = ""


def _module_of(node: Any) -> str | None:
    """The innermost module in the scopes that the exporter noted."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            modules = ast.literal_eval(entry.value)[:-1]  # the last scope is the operator
            return modules[-1] if modules else None
    return None


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """Errors against torch, max |y - reference| / max |reference|, and what the engine may have."""

    onnxruntime_error: float
    engine_error: float
    engine_tolerance: float


def compare_runtimes(
    model: nn.Module,
    path: Path,
    images: Tensor,
    *,
    engine: str,
    threads: int,
    tolerance: float,
    precision: str = "default",
    python_free: bool = False,
) -> Compared:
    """Largest relative error of ONNX Runtime and of the engine against torch.

    images (n, 3, S, S). ONNX Runtime computes the sparse nodes through the function body, the
    engine through its own kernel. Raises EngineError when one is above the tolerance; TensorRT, and
    its float16 copy by ONNX Runtime, are held to what rounding in float16 explains. TensorRT's
    engine is the one that `lpvit build` seals: it is built here, with its proof of sparsity, and
    put in place once its answers are right. In int8 it may be as far again from its int8 copy by
    ONNX Runtime as that is from float32, up to a limit.
    """
    from lpvit_edge.check import refuse_unequal, relative_error
    from lpvit_engines import load_engine

    with torch.no_grad():
        reference = torch.cat([model(image[None]) for image in images]).numpy()
    session = require("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    by_oracle = [session.run(None, {"images": image[None].numpy()})[0] for image in images]
    oracle = relative_error(np.concatenate(by_oracle), reference)
    refuse_unequal({"onnxruntime": oracle}, tolerance=tolerance)
    if engine == "tensorrt":
        built = _tensorrt(path, images, reference, precision=precision, python_free=python_free)
        return Compared(
            onnxruntime_error=oracle, engine_error=built.error, engine_tolerance=built.tolerance
        )
    with load_engine(engine, path, threads=threads, precision=precision) as loaded:
        by_engine = [loaded.infer(image[None].numpy()).copy() for image in images]
    error = relative_error(np.concatenate(by_engine), reference)
    refuse_unequal({engine: error}, tolerance=tolerance)
    return Compared(onnxruntime_error=oracle, engine_error=error, engine_tolerance=tolerance)


def _tensorrt(
    path: Path,
    images: Tensor,
    reference: "NDArray[np.float32]",
    *,
    precision: str,
    python_free: bool,
) -> "PlanCompared":
    """Build with proof, and hold the copy before it and the plan after it against torch."""
    from lpvit_edge.check import refuse_unequal, relative_error
    from lpvit_edge.tensorrt_build import build_proven
    from lpvit_edge.tensorrt_compare import against
    from lpvit_engines import resolve_precision
    from lpvit_engines.tensorrt.ranges import read_ranges
    from lpvit_engines.tensorrt.rounding import emulated, half_tolerance, int8_tolerance

    portable = require("onnx").load(path)
    bound = half_tolerance(portable)
    error = relative_error(emulated(portable, images.numpy()), reference)
    refuse_unequal({"the float16 copy": error}, tolerance=bound)  # before minutes of building
    precision = resolve_precision("tensorrt", precision)
    if precision == "int8":
        bound = int8_tolerance(bound, read_ranges(path)[0].error or 0.0)
    judge = against(reference, images.numpy()[:, None], name="torch", tolerance=bound)
    manifest = build_proven(path, precision=precision, python_free=python_free, judge=judge)
    assert manifest.compared is not None
    return manifest.compared
