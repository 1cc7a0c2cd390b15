"""An ONNX graph while it is rewritten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError


def read_model(path: Path) -> tuple[bytes, Any]:
    """The content of an ONNX file, and its ModelProto. Raises EngineError for anything else."""
    content = path.read_bytes()
    try:
        return content, require("onnx").load_from_string(content)
    except require("google.protobuf.message").DecodeError as error:
        raise EngineError(f"{path} is not an ONNX file: {error}") from error


class Graph:
    """Initializers by name, and nodes that are replaced by others in place."""

    def __init__(self, model: Any) -> None:
        numpy_helper = require("onnx.numpy_helper")
        self.graph = model.graph
        self._from_array: Callable[..., Any] = numpy_helper.from_array
        self.arrays: dict[str, NDArray[Any]] = {
            x.name: numpy_helper.to_array(x) for x in model.graph.initializer
        }
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def constant(self, name: str, array: NDArray[Any]) -> str:
        if name in self.arrays:
            raise EngineError(f"the ONNX file already has a tensor {name!r}; export it again")
        self.arrays[name] = array
        self.graph.initializer.append(self._from_array(np.ascontiguousarray(array), name))
        return name

    def replace(self, name: str, array: NDArray[Any]) -> None:
        for initializer in self.graph.initializer:
            if initializer.name == name:
                initializer.CopyFrom(self._from_array(np.ascontiguousarray(array), name))
                self.arrays[name] = array

    def rewrite(self, change: Callable[[Any], list[Any] | None]) -> None:
        """Put what `change` gives in each node's place; None leaves it."""
        nodes: list[Any] = []
        for node in list(self.graph.node):
            nodes.extend(change(node) or [node])
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def drop_unused(self) -> None:
        used = {name for node in self.graph.node for name in node.input}
        used |= {output.name for output in self.graph.output}
        kept = [x for x in self.graph.initializer if x.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
