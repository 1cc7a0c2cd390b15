"""Hold a TensorRT plan against another runtime before it is put in place."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lpvit_edge.check import refuse_unequal, relative_error
from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError, MissingDependencyError
from lpvit_edge.progress import say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lpvit_engines.tensorrt.answers import Answer
    from lpvit_engines.tensorrt.plan_file import Compared

    Judge: TypeAlias = Callable[[Answer], Compared]

_NOISE = 4  # inputs
_REMEDY = "pip install onnxruntime, then run this again"


def against(
    reference: "NDArray[np.float32]",
    inputs: "NDArray[np.float32]",
    *,
    name: str,
    tolerance: float,
) -> "Judge":
    """A judge that raises WrongAnswersError where a plan's answers to `inputs`, each in the
    network's shape, are off by more than the tolerance: a share of the largest of `reference`, the
    joined answers of the runtime `name`.
    """
    from lpvit_engines.tensorrt.plan_file import Compared

    words = "the torch model" if name == "torch" else name

    def judge(answer: "Answer") -> Compared:
        error = relative_error(np.concatenate([answer(x) for x in inputs]), reference)
        refuse_unequal({"tensorrt": error}, tolerance=tolerance, reference=words)
        return Compared(reference=name, inputs=len(inputs), error=error, tolerance=tolerance)

    return judge


def against_portable(onnx: Path, precision: str) -> "Judge | None":
    """A judge that knows an ONNX file alone, and asks another runtime about noise.

    In int8 the reference is the copy that TensorRT is given, by ONNX Runtime, since noise leaves
    the ranges that were found on images; else the file, by ONNX Runtime or OpenVINO. None, and
    said, without either. Raises EngineError for a file that the engine cannot take.
    """
    from lpvit_engines.tensorrt.graph import read_model

    _, portable = read_model(onnx)
    if len(portable.graph.input) != 1:
        names = [value.name for value in portable.graph.input]
        raise EngineError(f"{onnx} has inputs {names}; this engine takes models with one input")
    shape = [d.dim_value or 1 for d in portable.graph.input[0].type.tensor_type.shape.dim]
    noise = np.random.default_rng(0).standard_normal((_NOISE, *shape)).astype(np.float32)
    runtimes = (_by_onnxruntime,) if precision == "int8" else (_by_onnxruntime, _by_openvino)
    missing = []
    for by_runtime in runtimes:
        try:
            return by_runtime(portable, onnx, noise, precision)
        except MissingDependencyError as error:
            missing.append(str(error))
    why = missing[0].partition(" To get it")[0]  # which would bring torch, too
    say(f"the engine's answers are compared with nothing: {why} To have them compared: {_REMEDY}")
    return None


def _by_onnxruntime(
    portable: Any, onnx: Path, noise: "NDArray[np.float32]", precision: str
) -> "Judge":
    from lpvit_engines.tensorrt.ranges import read_ranges
    from lpvit_engines.tensorrt.rounding import answers_of_copy, half_tolerance, int8_tolerance

    session = require("onnxruntime").InferenceSession(onnx, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    single = np.concatenate([session.run(None, {name: x})[0] for x in noise])
    half = half_tolerance(portable)
    if precision != "int8":
        return against(single, noise, name="onnxruntime", tolerance=half)
    ranges = read_ranges(onnx)[0].largest
    whole = answers_of_copy(portable, noise, ranges=ranges, half=False)
    bound = int8_tolerance(half, relative_error(whole, single))
    return against(whole, noise, name="onnxruntime", tolerance=bound)


def _by_openvino(portable: Any, onnx: Path, noise: "NDArray[np.float32]", _: str) -> "Judge":
    from lpvit_engines import load_engine
    from lpvit_engines.tensorrt.rounding import half_tolerance

    with load_engine("openvino", onnx) as engine:
        single = np.concatenate([engine.infer(x) for x in noise])
    return against(single, noise, name="openvino", tolerance=half_tolerance(portable))
