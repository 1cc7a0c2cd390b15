"""Time of each layer inside a running network, where the engine can tell."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lpvit_edge.profile import random_input
from lpvit_edge.progress import say
from lpvit_edge.records import LayerShape

if TYPE_CHECKING:
    from lpvit_engines.tensorrt.times import GroupTime

_RUNS = 50


def in_place_ms(
    dense: Path, layers: tuple[LayerShape, ...], *, engine: str, threads: int
) -> dict[str, float]:
    """Time of each layer inside the running dense network; empty where the engine cannot tell.

    The layer's bias and its GELU, which the engine fuses, are in it. Layers that TensorRT runs as
    one kernel with others have no time of their own and are left out, with a line on stderr.
    """
    names = tuple(layer.name for layer in layers)
    if engine == "openvino":
        return _openvino(dense, names, threads)
    return _tensorrt(dense, names) if engine == "tensorrt" else {}


def _openvino(dense: Path, names: tuple[str, ...], threads: int) -> dict[str, float]:
    from lpvit_engines import load_engine
    from lpvit_engines.openvino_times import node_times

    with load_engine("openvino", dense, threads=threads) as loaded:
        x = random_input(loaded)
    found = dict.fromkeys(names, 0.0)
    for node in node_times(dense, x, threads=threads, runs=_RUNS).nodes:
        owners = {name.rpartition("/")[0] for name in node.originals} & found.keys()
        for owner in owners:
            found[owner] += node.median_ms
    return {name: ms for name, ms in found.items() if ms > 0.0}


def _tensorrt(dense: Path, names: tuple[str, ...]) -> dict[str, float]:
    from lpvit_engines import load_engine

    with load_engine("tensorrt", dense) as loaded:
        engine: Any = loaded
        groups: tuple[GroupTime, ...] = engine.layer_times(names, runs=_RUNS)
    fused = [group for group in groups if group.is_fused]
    if fused:
        said = "; ".join(f"{' + '.join(g.layers)} ({g.median_ms:.3f} ms)" for g in fused[:4])
        more = f"; {len(fused) - 4} more" if len(fused) > 4 else ""
        say(f"layers that run as one kernel, whose time is not divided: {said}{more}")
    together = {name for group in fused for name in group.layers}
    found = dict.fromkeys(names, 0.0)
    for group in groups:
        if len(group.layers) == 1:
            found[group.layers[0]] += group.median_ms
    return {name: ms for name, ms in found.items() if ms > 0.0 and name not in together}
