"""The attributes of lpvit::BlockSparseLinear as TensorRT carries them, from node and plan."""

from typing import Any

import numpy as np

from lpvit_edge.errors import EngineError

NAME, NAMESPACE, VERSION = "BlockSparseLinear", "lpvit", "1"
_INTEGERS = ("block_rows", "block_cols", "in_features", "out_features")


def read_fields(fields: Any) -> dict[str, Any]:
    """Attributes of the node, from a PluginFieldCollection. Raises EngineError in words."""
    found = {field.name: np.array(field.data) for field in fields}
    missing = [name for name in (*_INTEGERS, "activation") if name not in found]
    if missing:
        raise EngineError(
            f"{NAMESPACE}::{NAME} lacks {', '.join(missing)}: the engine or the ONNX file was made "
            "by another version of lpvit-edge; build it again"
        )
    given: dict[str, Any] = {name: int(found[name].reshape(-1)[0]) for name in _INTEGERS}
    activation = bytes(found["activation"].astype(np.int8).tobytes()).rstrip(b"\0").decode()
    if activation not in ("none", "gelu"):
        raise EngineError(f"{NAMESPACE}::{NAME} has activation {activation!r}; build it again")
    return {**given, "activation": activation}


def named_fields(trt: Any) -> Any:
    """What a node may carry: names and types without values."""
    none = np.array([], np.int32)
    fields = [trt.PluginField(n, none, trt.PluginFieldType.INT32) for n in _INTEGERS]
    text = np.array([], np.int8)
    fields.append(trt.PluginField("activation", text, trt.PluginFieldType.CHAR))
    return trt.PluginFieldCollection(fields)


def written_fields(trt: Any, given: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """(arrays, collection) of the attributes of one node; the fields point into the arrays."""
    arrays: dict[str, Any] = {name: np.array([given[name]], np.int32) for name in _INTEGERS}
    arrays["activation"] = np.frombuffer(given["activation"].encode(), np.int8).copy()
    fields = [trt.PluginField(n, arrays[n], trt.PluginFieldType.INT32) for n in _INTEGERS]
    text = arrays["activation"]
    fields.append(trt.PluginField("activation", text, trt.PluginFieldType.CHAR))
    return arrays, trt.PluginFieldCollection(fields)
