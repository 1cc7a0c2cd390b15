"""Each sparse layer as a network of its own, sparse and dense, timed in turns on the device."""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, ExitStack
from statistics import median
from typing import Any

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.build import Built
from lpvit_engines.tensorrt.session import Session
from lpvit_engines.tensorrt.sparsity import LayerProof, verdict

_WARM_RUNS, _ROUNDS = 20, 200

# (portable, layers to run dense, with SPARSE_WEIGHTS), in the precision of the engine
BuildOne = Callable[[Any, Collection[str], bool], Built]
OpenOne = Callable[[Built], AbstractContextManager[Session]]


def layer_model(portable: Any, layer: str) -> Any:
    """The nodes of one layer as a model of its own, with the shapes they have in the network."""
    onnx = require("onnx")
    names = {layer, *(f"{layer}/{op}" for op in ("MatMul", "Gemm", "Add"))}
    nodes = [node for node in portable.graph.node if node.name in names]
    if not nodes:
        raise EngineError(f"the ONNX file has no layer {layer}; export it again with lpvit build")
    weights = {x.name: x for x in portable.graph.initializer}
    made = {name for node in nodes for name in node.output}
    read = {name: None for node in nodes for name in node.input if name}
    inputs = [name for name in read if name not in weights and name not in made]
    shapes = {
        x.name: x
        for x in (*portable.graph.input, *portable.graph.output, *portable.graph.value_info)
    }
    if len(inputs) != 1 or inputs[0] not in shapes or nodes[-1].output[0] not in shapes:
        raise EngineError(
            f"the ONNX file does not say what layer {layer} is applied to; export it again with "
            "lpvit build"
        )
    graph = onnx.helper.make_graph(
        nodes,
        layer,
        [shapes[inputs[0]]],
        [shapes[nodes[-1].output[0]]],
        [weights[name] for name in read if name in weights],
    )
    return onnx.helper.make_model(graph, opset_imports=list(portable.opset_import))


def prove(
    portable: Any,
    layer: str,
    pattern: str,
    *,
    build_one: BuildOne,
    open_one: OpenOne,
) -> LayerProof:
    """Time a layer against its dense twin. Both run on the device, in turns, in one process.

    In int8 the twin is int8 too, and so is a 2:4 layer; a block-sparse one is float16.
    """
    alone = layer_model(portable, layer)
    twins = {
        "sparse": build_one(alone, (), True),
        "dense": build_one(alone, (layer,), False),
    }
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(open_one(twin)) for name, twin in twins.items()}
        samples = alternating(sessions)
    middle = {name: median(times) for name, times in samples.items()}
    spread = max(median(abs(t - middle[n]) for t in times) for n, times in samples.items())
    return verdict(
        layer=layer,
        pattern=pattern,
        dense_ms=middle["dense"],
        sparse_ms=middle["sparse"],
        spread_ms=spread,
        sparse_layers=twins["sparse"].layers,
        memory_skips=sum(twin.memory_skips for twin in twins.values()),
    )


def alternating(sessions: dict[str, Session]) -> dict[str, list[float]]:
    """Milliseconds of compute by the device's events, in turns, so that drift hits both alike."""
    for session in sessions.values():
        for _ in range(_WARM_RUNS):
            session.timed(data_transfers=False)
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(_ROUNDS):
        for name, session in sessions.items():
            samples[name].append(session.timed(data_transfers=False).compute_ms)
    return samples
