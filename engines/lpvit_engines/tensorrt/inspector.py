"""What TensorRT really built, from its engine inspector's JSON."""

import json
import re
from typing import Any

import msgspec

from lpvit_edge.errors import EngineError

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
# Names of sparse kernels, such as sm80_xmma_sparse_gemm_f16f16_...
_SPARSE = re.compile(r"spars|spmma|sptensor|sp_?gemm", re.IGNORECASE)


class EngineLayer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One layer of the built engine, and the ONNX nodes that TensorRT fused into it."""

    name: str  # what IProfiler calls it too
    kernel: str  # the tactic's name, or the type of layer where TensorRT names none
    originals: tuple[str, ...]
    sparse: bool  # a sparse kernel runs here
    type: str = ""  # of layer; a plugin may have a tactic's name as well


def engine_layers(text: str) -> tuple[EngineLayer, ...]:
    """Layers of an engine that was built with DETAILED verbosity.

    Raises EngineError for one that was not: its layers are mere names and prove nothing.
    """
    try:
        found = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"TensorRT's inspector gave no list of layers but {text[:80]!r}; build the engine again"
        ) from error
    if any(isinstance(layer, str) for layer in found):
        raise EngineError(
            "the engine was built without detailed profiling verbosity, so what runs in it cannot "
            "be read; build it with lpvit build"
        )
    return tuple(_layer(layer) for layer in found)


def _layer(fields: dict[str, Any]) -> EngineLayer:
    name = str(fields.get("Name", ""))
    kernel = str(fields.get("TacticName") or fields.get("LayerType") or "unnamed")
    by_metadata = _ONNX_LAYER.findall(str(fields.get("Metadata", "")))
    return EngineLayer(
        name=name,
        kernel=kernel,
        originals=tuple(dict.fromkeys(by_metadata or name.split(" + "))),
        sparse=_SPARSE.search(kernel) is not None,
        type=str(fields.get("LayerType") or ""),
    )


def owners(layers: tuple[EngineLayer, ...], node: str) -> tuple[EngineLayer, ...]:
    """The built layers that an ONNX node went into; empty where TensorRT lost its name."""
    return tuple(layer for layer in layers if node in layer.originals)
