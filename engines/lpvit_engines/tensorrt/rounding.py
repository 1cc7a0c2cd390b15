"""How far a network in float16 may be from the same one in float32.

Each operator rounds its result by at most u = 2^-11 of it. The errors of a chain of n operators
behave like n independent draws, so their sum grows with sqrt(n) (Higham and Mary, "A New Approach
to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41, 2019). A float16 sum inside a
product, wrong weights or an overflow are far above that.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy
from lpvit_engines.tensorrt.sparse_layers import sparse_layers

_UNIT_ROUNDOFF = 2.0**-11
# Of the two networks of examples/factory_line none of the linear layers can be left out without
# moving a logit further: benchmarks/results/tensorrt_int8_accuracy.json, "least_layer_left_out".
LARGEST_INT8 = 0.15
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


def int8_tolerance(half: float, error: float) -> float:
    """How far an int8 engine may be from float32: `half` for float16, and twice the `error` of its
    copy by ONNX Runtime, but never more than LARGEST_INT8.

    Two computations of one int8 graph part where a value falls on the other side of a step, by no
    more than int8 itself is off. The limit keeps a coarse int8 from excusing a wrong engine.
    """
    return min(half + 2.0 * error, LARGEST_INT8)


def emulated(
    portable: Any, images: NDArray[np.float32], *, ranges: Mapping[str, float] | None = None
) -> NDArray[np.float32]:
    """First output (n, classes) of the copy by ONNX Runtime, for images (n, 3, S, S) one by one: in
    float16, with `ranges` in int8.
    """
    return answers_of_copy(portable, images[:, None], ranges=ranges)


def answers_of_copy(
    portable: Any,
    inputs: Iterable[NDArray[np.float32]],
    *,
    ranges: Mapping[str, float] | None = None,
    half: bool = True,
) -> NDArray[np.float32]:
    """First outputs of the copy, joined, for inputs in the network's shape; without `half` what is
    float16 in it is float32.

    Block-sparse nodes are whole products there, in int8 too: ONNX Runtime has no plugin.
    """
    ort = require("onnxruntime")
    blocks = [name for name, form in sparse_layers(portable).items() if form != "2:4"]
    copy = tensorrt_copy(portable, dense=blocks, ranges=ranges, half=half)
    session = ort.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    answers = [session.run(None, {name: x})[0] for x in inputs]
    return np.concatenate(answers).astype(np.float32)
