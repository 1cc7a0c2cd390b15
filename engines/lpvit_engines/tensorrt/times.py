"""How long each layer takes inside a running engine, brought back to the model's layers.

Profiling slows the engine down, so shares come from here, absolute latency does not.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import msgspec

from lpvit_engines.tensorrt.inspector import EngineLayer


class GroupTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of the engine: the ONNX nodes fused into it, and its median time.

    Where `layers` names several of the model's layers, TensorRT runs them as one kernel and the
    time belongs to the group: it is not divided.
    """

    originals: tuple[str, ...]
    layers: tuple[str, ...]
    median_ms: float
    kernel: str

    @property
    def is_fused(self) -> bool:
        return len(self.layers) > 1


def make_profiler(trt: Any, samples: dict[str, list[float]]) -> Any:
    """An IProfiler that appends milliseconds by layer name; the caller keeps it alive."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            samples.setdefault(layer_name, []).append(ms)

    return Profiler()


def group_times(
    samples: Mapping[str, Sequence[float]],
    built: Sequence[EngineLayer],
    model_layers: Sequence[str],
) -> tuple[GroupTime, ...]:
    """Times by layer of the engine. A node named "blocks.0.mlp.fc1/MatMul" or "blocks.0.mlp.fc1"
    belongs to the model's layer "blocks.0.mlp.fc1"; the first run of each is left out."""
    by_name = {layer.name: layer for layer in built}
    known = set(model_layers)
    groups = []
    for name, times in samples.items():
        layer = by_name.get(name)
        originals = layer.originals if layer else (name,)
        mine = dict.fromkeys(x for node in originals for x in (node, node.rpartition("/")[0]))
        groups.append(
            GroupTime(
                originals=originals,
                layers=tuple(name for name in mine if name in known),
                median_ms=float(median(times[1:] or times)),
                kernel=layer.kernel if layer else "unnamed",
            )
        )
    return tuple(groups)
