"""Which form of lpvit::BlockSparseLinear a plan needs, and this process has registered.

TensorRT knows one creator of a name for as long as the process lives. It is not asked for the
creator: where there is none it would log an error.
"""

import threading
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.plugin_fields import NAME, NAMESPACE

Form: TypeAlias = Literal["python", "ptx"]
_WORDS = {
    "python": "in the form that calls Python; build the python_free plan in a process of its own",
    "ptx": "in the form of python_free plans; build or load one that calls Python in a process of "
    "its own",
}
_known: list[tuple[Any, Form]] = []  # tensorrt modules
_lock = threading.Lock()


def form_for(copy: Any, *, python_free: bool) -> Form | None:
    """The form that a TensorRT copy is built with; None where it has no such node, so that it can
    be built whatever is registered."""
    if all(node.domain != NAMESPACE for node in copy.graph.node):
        return None
    return "ptx" if python_free else "python"


def register_once(trt: Any, form: Form, register: Callable[[Any], None]) -> None:
    """Hand TensorRT's plugin registry to `register`, unless this form is registered already.

    Raises EngineError where the other form is, or there is no registry.
    """
    with _lock:
        found: Form | None = next((known for module, known in _known if module is trt), None)
        if found == form:
            return
        if found is not None:
            raise EngineError(
                f"{NAMESPACE}::{NAME} is registered in this process already, {_WORDS[found]}"
            )
        registry = trt.get_plugin_registry()
        if registry is None:
            raise EngineError("TensorRT has no plugin registry; reinstall TensorRT")
        register(registry)
        _known.append((trt, form))
