"""Engines, by name: they compile an ONNX model for one device and run it, and know no pruning.

A backend and its vendor library are imported only when asked for.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from lpvit_edge.errors import EngineError, UnknownEngineError
from lpvit_engines.base import Engine

__all__ = ["PRECISIONS", "Engine", "engine_names", "load_engine", "resolve_precision"]

_ENGINES = {
    "fake": "lpvit_engines.fake:FakeEngine",
    "openvino": "lpvit_engines.openvino_engine:OpenVinoEngine",
    "tensorrt": "lpvit_engines.tensorrt.engine:TensorRtEngine",
}
_KEEPING = frozenset({"tensorrt"})  # what they compiled stays beside the ONNX file
DEFAULT_PRECISION = "default"
# What load_engine accepts for each engine; the first is its default.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fake": ("float32",),
    "openvino": ("float32", "bf16", "int8"),
    "tensorrt": ("float16", "int8"),
}


def engine_names() -> tuple[str, ...]:
    """Names that load_engine accepts."""
    return tuple(_ENGINES)


def load_engine(
    name: str,
    path: Path,
    *,
    threads: int | None = None,
    precision: str = DEFAULT_PRECISION,
    rebuild: bool = False,
    accept: Callable[[Engine], None] | None = None,
) -> Engine:
    """Compile the ONNX model at `path` with the engine called `name`, on all cores or `threads`.

    `precision` "default" is the engine's own (float32 of openvino, float16 of tensorrt); what else
    it has is in PRECISIONS. An engine that keeps what it compiled (tensorrt) refuses that of
    another device with DeviceMismatchError, or compiles again with `rebuild`; what it compiles is
    kept only once `accept`, which is handed the engine, raised no MismatchError. The others compile
    at each load.

    Raises UnknownEngineError, MissingDependencyError where the engine's library is absent,
    EnvironmentUnfitError where this processor lacks the precision, and
    EngineError where the file is missing or refused.
    """
    if name not in _ENGINES:
        raise UnknownEngineError(f"no engine {name!r}; there are: {', '.join(_ENGINES)}")
    if threads is not None and threads < 1:
        raise EngineError(f"threads is {threads}; give 1 or more, or None for every core")
    chosen = resolve_precision(name, precision)
    module, _, cls = _ENGINES[name].partition(":")
    options: dict[str, Any] = {}
    if chosen != PRECISIONS[name][0]:
        options["precision"] = chosen
    if name in _KEEPING:
        options.update(rebuild=rebuild, accept=accept)
    engine: Engine = getattr(import_module(module), cls)(path, threads=threads, **options)
    return engine


_ALIASES = {"fp32": "float32", "fp16": "float16"}


def resolve_precision(name: str, precision: str) -> str:
    """The precision of the engine called `name` that is meant; EngineError for one it lacks."""
    if precision == DEFAULT_PRECISION:
        return PRECISIONS[name][0]
    precision = _ALIASES.get(precision, precision)
    if precision not in PRECISIONS[name]:
        known = ", ".join(PRECISIONS[name])
        raise EngineError(f"the engine {name} does not run in {precision!r}; it has: {known}")
    return precision
