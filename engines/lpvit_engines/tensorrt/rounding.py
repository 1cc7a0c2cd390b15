"""How far a network in float16 may be from the same one in float32.

Each operator rounds its result by at most u = 2^-11 of it. The errors of a chain of n operators
behave like n independent draws, so their sum grows with sqrt(n) (Higham and Mary, "A New Approach
to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019). A float16 sum inside a
product, wrong weights or an overflow are far above that.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy
from lpvit_engines.tensorrt.sparse_layers import sparse_layers

_UNIT_ROUNDOFF = 2.0**-11
_MARGIN = 2.0  # norms and residuals may raise a relative error before it reaches the logits


def longest_chain(model: Any) -> int:
    """Operators on the longest way from an input to an output; ONNX lists them in order."""
    depth: dict[str, int] = {}
    for node in model.graph.node:
        reached = 1 + max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, reached))
    return max((depth.get(output.name, 0) for output in model.graph.output), default=0)


def half_tolerance(model: Any) -> float:
    """Largest difference, as a fraction of the largest output, that float16 explains."""
    return _MARGIN * _UNIT_ROUNDOFF * math.sqrt(longest_chain(model))


def emulated(
    portable: Any, images: NDArray[np.float32], *, ranges: Mapping[str, float] | None = None
) -> NDArray[np.float32]:
    """First output (n, classes) of the copy by ONNX Runtime, for images (n, 3, S, S): in float16,
    with `ranges` in int8.

    Block-sparse nodes are whole products there, in int8 too: ONNX Runtime has no plugin.
    """
    ort = require("onnxruntime")
    blocks = [name for name, form in sparse_layers(portable).items() if form != "2:4"]
    copy = tensorrt_copy(portable, dense=blocks, ranges=ranges)
    session = ort.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    answers = [session.run(None, {name: image[None]})[0] for image in images]
    return np.concatenate(answers).astype(np.float32)
