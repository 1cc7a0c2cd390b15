"""What a plan answers, before it lies anywhere on disk."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.device import OpenDevice
from lpvit_engines.tensorrt.library import load_tensorrt
from lpvit_engines.tensorrt.making import LoadedPlan

# The first output for an input, float32, both in the network's shapes.
Answer: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@contextmanager
def answering(plan: bytes, device: OpenDevice, *, python_free: bool) -> Iterator[Answer]:
    """Load a plan on the device, whose context is current, and run it as the engine would."""
    with LoadedPlan(load_tensorrt(), device, plan, python_free=python_free) as session:
        if len(session.inputs) != 1 or not session.outputs:
            raise EngineError(
                f"the model has {len(session.inputs)} inputs and {len(session.outputs)} outputs; "
                "this engine takes models with one input, whose first output is the answer"
            )

        def answer(x: NDArray[np.float32]) -> NDArray[np.float32]:
            np.copyto(session.inputs[0].array(), x)
            session.run()
            return session.outputs[0].array().copy()

        yield answer
