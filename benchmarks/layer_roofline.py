"""GF/s of each linear layer on one core, beside what the core reaches without any memory access."""

import statistics
import time
from typing import Any

import numpy as np

from benchmarks.vit_onnx import Gemm, prune_at_random
from lpvit_engines.native import PackedLayer, Precision, fma_flops

TOKENS = 197
REPEATS = 15


def measured_peak_gflops(precision: Precision = "float32") -> float:
    """The best of several runs of the kernel's multiply-add loop, by the thread's own CPU time."""
    return max(_gflops_of_loop(precision) for _ in range(20))


def _gflops_of_loop(precision: Precision, rounds: int = 200_000) -> float:
    start = time.thread_time()
    flops = fma_flops(rounds, precision=precision)
    return flops / (time.thread_time() - start) / 1e9


def roofline(
    gemms: dict[tuple[str, float], list[Gemm]],
    *,
    peak_gflops: float,
    precision: Precision = "float32",
) -> list[dict[str, Any]]:
    """A row for each distinct shape of each (pattern, sparsity), useful work only."""
    rows = []
    for (pattern, sparsity), layers in gemms.items():
        shapes = dict.fromkeys((g.in_features, g.out_features) for g in layers)
        for in_features, out_features in shapes:
            milliseconds, flops = time_layer(
                in_features, out_features, pattern, sparsity, precision
            )
            gflops = flops / milliseconds / 1e6
            rows.append(
                {
                    "pattern": pattern,
                    "sparsity": sparsity,
                    "in_features": in_features,
                    "out_features": out_features,
                    "layer_ms": round(milliseconds, 4),
                    "gflops": round(gflops, 1),
                    "of_peak": round(gflops / peak_gflops, 3),
                }
            )
    return rows


def time_layer(
    in_features: int, out_features: int, pattern: str, sparsity: float, precision: Precision
) -> tuple[float, float]:
    """Median thread CPU time in ms of one call, and its floating-point operations."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out_features, in_features), dtype=np.float32)
    rows, columns = map(int, pattern.split("x"))
    matrix = prune_at_random(weight, block=(rows, columns), sparsity=sparsity, rng=rng)
    x = rng.standard_normal((TOKENS, in_features), dtype=np.float32)
    out = np.empty((TOKENS, out_features), np.float32)
    times = []
    with PackedLayer(matrix, precision=precision) as layer:
        for _ in range(REPEATS):
            start = time.thread_time()
            layer(x, out)
            times.append(time.thread_time() - start)
    return statistics.median(times) * 1e3, 2.0 * TOKENS * float(matrix.values.size)
