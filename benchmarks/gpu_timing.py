"""The part of the GPU benchmarks that needs a GPU: CUDA graphs, the roofline, NVML's counter.

What is done with the numbers is in gpu_rounds.py.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu_rounds import Sample
from lpvit_edge.deps import require
from lpvit_edge.errors import LpvitEdgeError, MeasurementError

Run = Callable[[int], Any]  # starts the work on weight copy i and returns its result
_ROOFLINE_REPLAYS = 15
_MATRIX = 8192
_COPY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """What the device at hand reaches, measured, not its data sheet."""

    flops_per_s: float
    bytes_per_s: float

    def floor_us(self, *, macs: float, moved_bytes: float) -> float:
        """No kernel that does this work from DRAM can be faster."""
        return 1e6 * max(2 * macs / self.flops_per_s, moved_bytes / self.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph of several launches: result is what the last of them writes at every replay, and
    sample_us measures one replay, in microseconds per launch.

    A graph holds addresses, not tensors: run is here to keep alive what the launches read.
    """

    replay: Callable[[], None]
    sample_us: Sample
    result: Any
    run: Run


Capture = Callable[..., Captured]  # capture, or a fake of it


def capture(run: Run, *, copies: int) -> Captured:
    """A CUDA graph of run(0) to run(copies - 1), after a warm-up that loads every kernel.

    Distinct copies keep the weights out of the L2 cache, where they would not be inside a model.
    """
    graph, result = _graph_of(run, copies=copies)

    def sample_us() -> float:
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(1e3 * begin.elapsed_time(end) / copies)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return Captured(replay=replay, sample_us=sample_us, result=result, run=run)


def probe() -> None:
    """Raises where the device, or the allocator behind a failed capture, is lost for this process:
    CUDA answers every call after an illegal address with that error."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _graph_of(run: Run, *, copies: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(copies, 3)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph, result, stream = torch.cuda.CUDAGraph(), None, torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for i in range(copies):
                result = run(i)
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream behind
    graph.replay()
    torch.cuda.synchronize()
    return graph, result


def measured_roofline(*, dtype: torch.dtype) -> Roofline:
    """The device's best dense matrix multiplication and its best copy."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=dtype) for _ in range(2))
    multiply_us = _median_us(lambda _: torch.mm(a, b))
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = _median_us(lambda _: target.copy_(source))
    return Roofline(
        flops_per_s=2e6 * _MATRIX**3 / multiply_us, bytes_per_s=2e6 * _COPY_BYTES / copy_us
    )


def _median_us(run: Run) -> float:
    captured = capture(run, copies=4)
    return statistics.median(captured.sample_us() for _ in range(_ROOFLINE_REPLAYS))


@dataclass(frozen=True, kw_only=True)
class EnergyMeter:
    """window_mj(replay) repeats a replay for a while and returns the millijoules of one; it raises
    MeasurementError where the sensor cannot tell. notes collects the sensor's reservations."""

    source: str
    window_mj: Callable[[Callable[[], object]], float]
    notes: set[str] = field(default_factory=set)


@contextmanager
def energy_meter(*, window_s: float) -> Iterator[EnergyMeter]:
    """NVML on the device that torch uses: the whole board, idle power included. Where there is no
    sensor, every window raises MeasurementError with the reason, so that no time is lost."""
    from lpvit_profilers.nvml import NvmlSource

    try:
        source = NvmlSource(_nvml_index())
        source.open()
    except LpvitEdgeError as error:
        yield no_meter(str(error))
        return
    try:
        with metered(source, window_s=window_s) as meter:
            yield meter
    finally:
        source.close()


@contextmanager
def metered(source: Any, *, window_s: float) -> Iterator[EnergyMeter]:
    """A meter on an open power source of lpvit_profilers."""
    from lpvit_profilers.energy_window import measure_window
    from lpvit_profilers.sampler import Sampler

    notes: set[str] = set()
    with Sampler(source) as sampler:

        def window_mj(replay: Callable[[], object]) -> float:
            window = measure_window(replay, sampler, source.info, for_s=window_s)
            if window.energy_mj is None:
                raise MeasurementError(window.reason or "the sensor gave no energy")
            if window.reason is not None:
                notes.add(window.reason)
            return window.energy_mj / window.calls

        yield EnergyMeter(source=source.info.name, window_mj=window_mj, notes=notes)


def no_meter(reason: str) -> EnergyMeter:
    """A meter that says why it cannot measure."""

    def refuse(replay: Callable[[], object]) -> float:
        raise MeasurementError(reason)

    return EnergyMeter(source="none", window_mj=refuse)


def _nvml_index() -> int:
    """NVML's number of the device that torch calls 0; CUDA_VISIBLE_DEVICES may set them apart."""
    pynvml = require("pynvml")
    try:
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
            return int(pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise MeasurementError(f"NVML: {error}") from error
