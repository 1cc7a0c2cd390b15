"""CUDA graphs on a CPU, with the times that a test wants."""

from typing import Any

import torch

from benchmarks.gpu_timing import Captured


class FakeGraphs:
    """Captures by running eagerly; a replay runs again into the same result, and takes the times
    that are told, in turn."""

    def __init__(self, *times_us: float) -> None:
        self.times_us = times_us or (50.0,)
        self.events: list[str] = []
        self.graphs = 0

    def capture(self, run: Any, *, copies: int) -> Captured:
        number, replays = self.graphs, 0
        self.graphs += 1
        self.events.append(f"capture {number} of {copies}")
        results = [run(i) for i in range(copies)]
        result = results[-1].clone()

        def sample_us() -> float:
            nonlocal replays
            replays += 1
            self.events.append(f"replay {number}")
            with torch.inference_mode():  # a model captured in it may only be written in it
                result.copy_(run(copies - 1))
            return self.times_us[number % len(self.times_us)]

        return Captured(replay=lambda: None, sample_us=sample_us, result=result, run=run)
