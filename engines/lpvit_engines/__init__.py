"""Engines, by name: they compile an ONNX model for one device and run it, and know no pruning.

A backend and its vendor library are imported only when asked for.
"""

from importlib import import_module
from pathlib import Path

from lpvit_edge.errors import EngineError, UnknownEngineError
from lpvit_engines.base import Engine

__all__ = ["Engine", "engine_names", "load_engine"]

_ENGINES = {
    "fake": "lpvit_engines.fake:FakeEngine",
    "openvino": "lpvit_engines.openvino_engine:OpenVinoEngine",
    "tensorrt": "lpvit_engines.tensorrt.engine:TensorRtEngine",
}
_KEEPING = frozenset({"tensorrt"})  # what they compiled stays beside the ONNX file


def engine_names() -> tuple[str, ...]:
    """Names that load_engine accepts."""
    return tuple(_ENGINES)


def load_engine(
    name: str, path: Path, *, threads: int | None = None, rebuild: bool = False
) -> Engine:
    """Compile the ONNX model at `path` with the engine called `name`, on all cores or `threads`.

    An engine that keeps what it compiled (tensorrt) refuses that of another device with
    DeviceMismatchError, or compiles again with `rebuild`; the others compile at each load.

    Raises UnknownEngineError, MissingDependencyError where the engine's library is absent, and
    EngineError where the file is missing or refused.
    """
    if name not in _ENGINES:
        raise UnknownEngineError(f"no engine {name!r}; there are: {', '.join(_ENGINES)}")
    if threads is not None and threads < 1:
        raise EngineError(f"threads is {threads}; give 1 or more, or None for every core")
    module, _, cls = _ENGINES[name].partition(":")
    options = {"rebuild": True} if rebuild and name in _KEEPING else {}
    engine: Engine = getattr(import_module(module), cls)(path, threads=threads, **options)
    return engine
