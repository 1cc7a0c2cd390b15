"""Timing on a CUDA device: CUDA graphs over distinct weights, the device's own roofline, energy."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lpvit_edge.deps import require
from lpvit_edge.errors import LpvitEdgeError, MissingDependencyError

Run = Callable[[int], Any]  # starts the work on weight copy i
Timer = Callable[..., float]  # graph_us, or a fake of it
REPLAYS = 15
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


def refusals() -> tuple[type[Exception], ...]:
    """What libraries raise when they refuse a layer; the table says so, and goes on."""
    known = (RuntimeError, ValueError, AssertionError, LpvitEdgeError)
    try:
        from triton.errors import TritonError
    except ImportError:  # torch for CPUs comes without triton
        return known
    return (*known, TritonError)


def reason_of(refused: Exception) -> str:
    """An error as one line; an assert has no text at all."""
    first = next(iter(str(refused).splitlines()), "")
    return f"{type(refused).__name__}: {first}" if first else type(refused).__name__


def graph_us(run: Run, *, copies: int) -> float:
    """Median microseconds per launch of one CUDA graph that walks over all weight copies.

    Distinct copies keep the weights out of the L2 cache, where they would not be inside a model.
    """
    graph = captured(run, copies=copies)
    times: list[float] = []
    for _ in range(REPLAYS):
        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / copies)
    return statistics.median(times)


def captured(run: Run, *, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of run(0) to run(copies - 1), after a warm-up that loads every kernel."""
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(copies, 3)):
            run(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def measured_roofline(*, dtype: torch.dtype) -> Roofline:
    """The device's best dense matrix multiplication and its best copy."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device="cuda", dtype=dtype) for _ in range(2))
    multiply_us = graph_us(lambda _: torch.mm(a, b), copies=4)
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_us = graph_us(lambda _: target.copy_(source), copies=4)
    return Roofline(
        flops_per_s=2e6 * _MATRIX**3 / multiply_us, bytes_per_s=2e6 * _COPY_BYTES / copy_us
    )


def energy_mj(graph: torch.cuda.CUDAGraph, *, seconds: float = 5.0) -> float | str:
    """Millijoules per replay by NVML's energy counter, or why there is none; never raises for
    want of NVML, so that a time measured before is kept.

    The counter is the whole board's, idle power included; it moves in steps of some 20 to 100 ms,
    which seconds of replays make small.
    """
    try:
        pynvml = require("pynvml")
    except MissingDependencyError as error:
        return str(error)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
        replays = 0
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in range(20):
                graph.replay()
            torch.cuda.synchronize()
            replays += 20
        spent = pynvml.nvmlDeviceGetTotalEnergyConsumption(device) - before
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    finally:
        pynvml.nvmlShutdown()
    return float(spent) / replays if spent else "the energy counter did not move"
