"""TensorRT's own progress, handed on: a build on a Jetson is silent for many minutes otherwise."""

from collections.abc import Callable
from typing import Any, TypeAlias

# (phase, steps done, steps in all); called from TensorRT's threads.
OnStep: TypeAlias = Callable[[str, int, int], None]


def make_monitor(trt: Any, on_step: OnStep) -> Any:
    """An IProgressMonitor; the caller keeps it alive until the build is over."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps.get(phase_name, 0))
            self._steps.pop(phase_name, None)

        def _tell(self, phase: str, done: int) -> bool:
            try:
                on_step(phase, done, self._steps.get(phase, 0))
            except KeyboardInterrupt:  # TensorRT would swallow it; False ends the build
                self._cancelled = True
            return not self._cancelled

    return Monitor()
