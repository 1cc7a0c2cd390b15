"""How long each node takes inside a running OpenVINO network.

Counting costs time itself, so shares come from here and absolute latency from a run without it.
"""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_engines.openvino_engine import settings


class NodeTime(msgspec.Struct, frozen=True, kw_only=True):
    """One node of the compiled graph: what it was fused from, and its median time."""

    originals: tuple[str, ...]  # names in the ONNX file
    median_ms: float


def node_times(
    path: Path, x: NDArray[np.float32], *, threads: int, runs: int
) -> tuple[NodeTime, ...]:
    """Median time of each executed node of a dense model over `runs` calls, counters on."""
    openvino = require("openvino")
    chosen = {**settings(threads), "PERF_COUNT": True}
    compiled = openvino.Core().compile_model(path, "CPU", chosen)
    originals = _originals(compiled)
    request = compiled.create_infer_request()
    samples: dict[str, list[float]] = {}
    for _ in range(runs + 1):
        request.infer({0: x}, share_inputs=True)
        for info in request.get_profiling_info():
            samples.setdefault(info.node_name, []).append(info.real_time.total_seconds() * 1e3)
    return tuple(
        NodeTime(originals=originals.get(name, (name,)), median_ms=float(np.median(times[1:])))
        for name, times in samples.items()
    )


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
