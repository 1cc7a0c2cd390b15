"""Attention on the native kernel, in networks that have sparse layers.

Once the linear layers are sparse, attention is the largest part of what is left. OpenVINO computes
it as products, a softmax and transpositions; the kernel (native/attention_tile.cpp) takes queries,
keys and values as the linear layer before it leaves them.

A place is found by the shapes around a softmax and accepted by proof: all candidates are cut out
of the network, run by OpenVINO on random numbers, and replaced only where the kernel gives the
same. So a mask, a bias on the scores (Swin), another order of heads or another scale keeps
OpenVINO's own.

In int8 the products of attention are taken in bfloat16 where the processor has AVX512_BF16; the
proof is made in float32 there too.
"""

import ctypes
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError
from lpvit_engines.native import BF16_INSTRUCTION_SET, Precision, instruction_set
from lpvit_engines.native_library import library

NODE = "Attention"
# Of the largest output; float32 sums over a few hundred tokens differ by about 1e-6.
TOLERANCE = 1e-4


class Attention(msgspec.Struct, frozen=True, kw_only=True):
    """One attention of a graph: from the output `qkv` (batch, tokens, 3 * heads * head_dim) of one
    node to the output (batch, tokens, heads * head_dim) of another."""

    source: str  # friendly names in the graph
    result: str
    batch: int
    tokens: int
    heads: int
    head_dim: int


def fuse_attention(
    model: Any, factory: Any, *, thread_table: int | None, precision: Precision = "float32"
) -> dict[str, str]:
    """Put the kernel in the place of every attention that computes the same; edits `model`.

    `factory` makes native operators (openvino_node.native_operators). Returns the kernel by the
    name of the node that gave the attention's result.
    """
    isa, used = instruction_set(), attention_instruction_set(precision)
    candidates = [
        found
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Softmax"
        and (found := _around(node)) is not None
        and kernel_address(isa, found.head_dim)
        and kernel_address(used, found.head_dim)
    ]
    proved = _proved(model, candidates, isa=isa)
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    for found in proved:
        attributes = {
            "run": _address(library().lpvit_attention),
            "kernel": kernel_address(used, found.head_dim),
            "threads": thread_table or 0,
            "heads": found.heads,
            "head_dim": found.head_dim,
        }
        fused = factory.create(NODE, [nodes[found.source].output(0)], attributes)
        fused.set_friendly_name(found.result)
        _redirect(nodes[found.result].output(0), fused.output(0))
    return {f.result: f"lpvit_{used} attention {f.heads} x {f.head_dim}" for f in proved}


def attention_instruction_set(precision: Precision) -> str:
    """The one whose attention a network of that precision runs."""
    if precision == "int8" and instruction_set("int8") == "avx512_vnni":
        narrow = BF16_INSTRUCTION_SET
        return narrow if library().lpvit_supports(narrow.encode()) else instruction_set()
    return instruction_set()


def kernel_address(isa: str, head_dim: int) -> int:
    """Address of the kernel for heads of this width, 0 where the instruction set has none."""
    return int(library().lpvit_attention_kernel(isa.encode(), head_dim) or 0)


def attention(
    qkv: NDArray[np.float32], *, heads: int, isa: str, threads: int | None = None
) -> NDArray[np.float32]:
    """softmax(Q K^T / sqrt(head_dim)) V of each head.

    qkv (tokens, 3 * heads * head_dim), contiguous float32: a token's queries of all heads, its
    keys, its values. Returns (tokens, heads * head_dim). Raises EngineError where the instruction
    set has no kernel for this width, and without memory.
    """
    head_dim = qkv.shape[1] // (3 * heads)
    kernel = kernel_address(isa, head_dim)
    if not kernel or not qkv.flags.c_contiguous or qkv.dtype != np.float32:
        raise EngineError(
            f"no {isa} attention for heads of {head_dim} over {qkv.dtype}; it takes contiguous "
            "float32 and heads that are a multiple of a register's floats"
        )
    out = np.empty((len(qkv), heads * head_dim), np.float32)
    failed = library().lpvit_attention(
        kernel, threads, qkv.ctypes.data, len(qkv), heads, head_dim, head_dim**-0.5, out.ctypes.data
    )
    if failed:
        raise EngineError("no memory for the attention's scores; free some and run again")
    return out


def _around(softmax: Any) -> Attention | None:
    """The attention that a softmax may be the heart of, by the shapes around it."""
    scores = _static_shape(softmax.output(0))
    if scores is None or len(scores) != 4 or scores[2] != scores[3]:
        return None
    batch, heads, tokens, _ = scores
    result = softmax
    for kind in ("MatMul", "Transpose", "Reshape"):
        readers = list(result.output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() != kind:
            return None
        result = readers[0].get_node()
    shape = _static_shape(result.output(0))
    if shape is None or shape[:-1] != (batch, tokens) or shape[-1] % heads:
        return None
    source = _only_source(result, (batch, tokens, 3 * shape[-1]))
    if source is None:
        return None
    return Attention(
        source=source.get_friendly_name(),
        result=result.get_friendly_name(),
        batch=batch,
        tokens=tokens,
        heads=heads,
        head_dim=shape[-1] // heads,
    )


def _only_source(result: Any, shape: tuple[int, ...]) -> Any | None:
    """The one float32 node of that shape on which `result` depends; None where it needs others."""
    sources: dict[str, Any] = {}
    seen: set[str] = set()
    waiting = [result]
    while waiting:
        node = waiting.pop()
        for value in node.input_values():
            before = value.get_node()
            name = before.get_friendly_name()
            if name in seen:
                continue
            seen.add(name)
            if before.get_output_size() == 1 and _is_float32(before.output(0), shape):
                sources[name] = before
            elif before.get_type_name() == "Parameter" or len(seen) > 100:
                return None
            else:
                waiting.append(before)
    return next(iter(sources.values())) if len(sources) == 1 else None


def _proved(model: Any, candidates: list[Attention], *, isa: str) -> list[Attention]:
    """Those that give what OpenVINO gives, cut out of the network and run on random numbers."""
    if not candidates:
        return []
    openvino = require("openvino")
    copy = model.clone()
    nodes = {node.get_friendly_name(): node for node in copy.get_ordered_ops()}
    inputs = []
    for found in candidates:
        shape = [found.batch, found.tokens, 3 * found.heads * found.head_dim]
        cut = openvino.opset13.parameter(shape, np.float32)
        _redirect(nodes[found.source].output(0), cut.output(0))
        inputs.append(cut)
    outputs = [nodes[found.result].output(0) for found in candidates]
    compiled = openvino.Core().compile_model(
        openvino.Model(outputs, inputs), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    generator = np.random.default_rng(0)
    xs = [generator.standard_normal(tuple(p.get_output_shape(0)), np.float32) for p in inputs]
    expected = compiled(xs)
    return [
        found
        for index, found in enumerate(candidates)
        if _same(expected[index], xs[index], found, isa=isa)
    ]


def _same(
    expected: NDArray[np.float32], x: NDArray[np.float32], found: Attention, *, isa: str
) -> bool:
    ours = np.stack([attention(image, heads=found.heads, isa=isa) for image in x])
    return bool(np.abs(ours - expected).max() <= TOLERANCE * np.abs(expected).max())


def _redirect(old: Any, new: Any) -> None:
    for reader in old.get_target_inputs():
        reader.replace_source_output(new)


def _is_float32(output: Any, shape: tuple[int, ...]) -> bool:
    return _static_shape(output) == shape and output.get_element_type().get_type_name() == "f32"


def _static_shape(output: Any) -> tuple[int, ...] | None:
    shape = output.get_partial_shape()
    return tuple(shape.to_shape()) if shape.is_static else None


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)
