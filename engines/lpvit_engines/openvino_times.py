"""How long each node takes inside a running OpenVINO network.

Counting costs time itself, so shares come from here and absolute latency from a run without it.
A counter of OpenVINO's processor plugin is the mean over all calls so far, in whole microseconds
(PerfCount::avg in its src/plugins/intel_cpu/src/perf_count.h), so a single call is a difference.
"""

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lpvit_engines.native import Precision
from lpvit_engines.openvino_engine import compile_network, settings


class NodeTime(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the compiled graph: what it was fused from, what runs it, and its median time."""

    name: str
    originals: tuple[str, ...]  # names in the ONNX file
    kernel: str  # as engine.kernels() names it
    median_ms: float


class CallTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The median of whole calls with counters on, and of each node that they executed."""

    median_ms: float
    nodes: tuple[NodeTime, ...]


def node_times(
    path: Path,
    x: NDArray[np.float32],
    *,
    threads: int,
    runs: int,
    precision: Precision = "float32",
) -> CallTimes:
    """Times of a model, dense or sparse, over `runs` calls, by OpenVINO's counters.

    x is float32 of the model's input shape. Raises what compile_network() does.
    """
    chosen = {**settings(threads, precision=precision), "PERF_COUNT": True}
    network = compile_network(path, chosen, precision)
    originals = _originals(network.compiled)
    request = network.compiled.create_infer_request()
    calls, samples, kernels = list[float](), dict[str, list[float]](), dict[str, str]()
    for _ in range(1 + runs):  # the first is not counted
        start = time.perf_counter()
        request.infer({0: x}, share_inputs=True)
        calls.append((time.perf_counter() - start) * 1e3)
        for info in request.get_profiling_info():
            samples.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e3)
            kernels[info.node_name] = f"{info.node_type} {info.exec_type}"
    del request
    network.nodes.close()
    kernels.update(network.ours)
    return CallTimes(
        median_ms=float(np.median(calls[1:])),
        nodes=tuple(
            NodeTime(
                name=name,
                originals=originals.get(name, (name,)),
                kernel=kernels[name],
                median_ms=float(np.median(single_calls(means)[1:])),
            )
            for name, means in samples.items()
        ),
    )


def single_calls(means: list[float]) -> NDArray[np.float64]:
    """What was added by each call, from the means (calls,) of all calls up to it."""
    return np.diff(np.array(means) * np.arange(1, len(means) + 1), prepend=0.0)


def _originals(compiled: Any) -> dict[str, tuple[str, ...]]:
    """Node of the compiled graph -> the nodes of the file it stands for."""
    found = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if "originalLayersNames" in info:
            value = info["originalLayersNames"]
            text = str(value.astype(str)) if hasattr(value, "astype") else str(value)
            found[node.get_friendly_name()] = tuple(name for name in text.split(",") if name)
    return found
