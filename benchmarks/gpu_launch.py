"""What a launch costs in Python: CPU time of three ways to it, against the tests' fake driver.

    python -m benchmarks.gpu_launch [--out OUT.json]

    Kernel.launch       the launcher itself, with addresses at hand
    plugin enqueue      what TensorRT calls; its descriptors are plain tuples here, the real ones
                        come through pybind on top
    torch operator      dispatch, checks, the output's allocation and the launch, on CPU tensors
                        under inference_mode; a GPU adds torch.cuda.device and current_stream

Needs torch, a C compiler and no GPU. The fake copies 80 bytes of parameters and returns: what a
real driver adds is not in it. The ways take turns in every round.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Literal

import msgspec
import torch

from benchmarks.gpu_output import writable
from lpvit_edge.files import write_atomic
from lpvit_engines.cuda.kernel import Kernel, open_kernel
from lpvit_engines.cuda.torch_op import checked_launch, registered, to_tensors
from lpvit_engines.tensorrt.plugin_parts import Launches
from tests.cuda.fake_driver import compile_fake_driver, state_of
from tests.cuda.layers import Case, layer

ROUNDS, LAUNCHES = 40, 2000
GOAL_US: Final = 5.0
TOKENS, IN_FEATURES, OUT_FEATURES = 197, 768, 3072
Launch = Callable[[], object]


class PathTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """CPU microseconds of Python per launch on one way: of the rounds' means the median, the
    quartiles and the extremes."""

    path: str
    median_us: float
    quartiles_us: tuple[float, float]
    range_us: tuple[float, float]
    below_goal: bool


class LaunchTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All ways, each in `rounds` rounds of `launches`, and what they depend on."""

    kind: Literal["gpu_launch"] = "gpu_launch"
    format: Literal[2] = 2
    command: str
    processor: str
    architecture: str
    cores: int
    load_average_1min: float
    python: str
    torch: str
    driver: Literal["fake"] = "fake"
    rounds: int
    launches: int
    goal_us: float = GOAL_US
    paths: tuple[PathTime, ...]


def kernel_launch(kernel: Kernel) -> Launch:
    return partial(
        kernel.launch, x=0x1000, values=0x2000, rows=0x3000, columns=0x4000, bias=0x5000,
        residual=0, tokens=TOKENS, ldx=IN_FEATURES, ldy=OUT_FEATURES, y=0x6000,
        block_row_count=OUT_FEATURES // 64, stream=0,
    )  # fmt: skip


def plugin_enqueue(kernel: Kernel) -> Launch:
    runs = Launches()
    runs.kernel = kernel
    runs.given = {"in_features": IN_FEATURES, "out_features": OUT_FEATURES}
    described = [
        SimpleNamespace(dims=dims)
        for dims in ((1, TOKENS, IN_FEATURES), (), (OUT_FEATURES // 64, 4))
    ]
    inputs = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000]
    return lambda: runs.enqueue(described, None, inputs, [0x6000], 0, 0)


@lru_cache(maxsize=1)
def _operator() -> tuple[Any, list[Kernel]]:
    """The operator whose CPU side launches, and the kernel that it launches."""
    holder: list[Kernel] = []
    launches = partial(checked_launch, find=lambda *_: holder[-1], device=0, stream=0)
    op = registered("lpvit_launch::block_sparse_linear", on_cuda=launches, on_cpu=launches)
    return op, holder


def torch_operator(kernel: Kernel) -> Launch:
    case = Case(
        block_rows=64, block_cols=64, tokens=TOKENS, in_features=IN_FEATURES,
        block_row_count=OUT_FEATURES // 64,
    )  # fmt: skip
    made = layer(case)
    weight = to_tensors(made.packed, None, device="cpu")
    x = torch.from_numpy(made.x).view(torch.float16)
    op, holder = _operator()
    holder[:] = [kernel]

    def launch() -> None:
        op(
            x, weight.values, weight.rows, weight.columns, weight.bias, None, weight.in_features,
            weight.block_cols, "none",
        )  # fmt: skip

    return launch


PATHS: dict[str, Callable[[Kernel], Launch]] = {
    "Kernel.launch": kernel_launch,
    "plugin enqueue": plugin_enqueue,
    "torch operator": torch_operator,
}


def launch_us(launch: Launch, *, launches: int) -> float:
    """CPU microseconds of this thread per launch, as a mean over one round."""
    begin_ns = time.thread_time_ns()
    for _ in range(launches):
        launch()
    return (time.thread_time_ns() - begin_ns) / 1e3 / launches


@contextmanager
def fake_kernel() -> Iterator[Kernel]:
    """A kernel on the fake driver."""
    with tempfile.TemporaryDirectory() as folder:
        library = compile_fake_driver(Path(folder))
        state_of(library)
        with open_kernel(
            block_rows=64, block_cols=64, dtype="float16", library=str(library)
        ) as kernel:
            yield kernel


def measured_rounds(*, rounds: int, launches: int) -> dict[str, list[float]]:
    """The mean launch of every round by way, in turns, on a kernel opened once."""
    with fake_kernel() as kernel, torch.inference_mode():
        ways = {name: make(kernel) for name, make in PATHS.items()}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for launch in ways.values():
            launch()  # loads, and checks the weight
        for _ in range(rounds):
            for name, launch in ways.items():
                found[name].append(launch_us(launch, launches=launches))
    return found


def path_time(name: str, rounds_us: list[float]) -> PathTime:
    """The spread of at least two rounds."""
    low, median, high = statistics.quantiles(rounds_us, n=4)
    return PathTime(
        path=name,
        median_us=round(median, 3),
        quartiles_us=(round(low, 3), round(high, 3)),
        range_us=(round(min(rounds_us), 3), round(max(rounds_us), 3)),
        below_goal=median < GOAL_US,
    )


def record_of(
    rounds_us: dict[str, list[float]], *, rounds: int, launches: int, command: str
) -> LaunchTime:
    """The record of measured rounds, at least two, on this machine."""
    return LaunchTime(
        command=command,
        processor=processor(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        load_average_1min=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        torch=str(torch.__version__),  # a TorchVersion
        rounds=rounds,
        launches=launches,
        paths=tuple(path_time(name, found) for name, found in rounds_us.items()),
    )


def processor() -> str:
    """The processor's name as Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what a launch costs in Python.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    parser.add_argument("--out", type=writable)
    chosen = parser.parse_args()
    found = record_of(
        measured_rounds(rounds=chosen.rounds, launches=chosen.launches),
        rounds=chosen.rounds,
        launches=chosen.launches,
        command=" ".join(["python -m benchmarks.gpu_launch", *sys.argv[1:]]),
    )
    for path in found.paths:
        print(
            f"{path.path:15} {path.median_us:6.2f} us a launch ({path.range_us[0]:.2f} to "
            f"{path.range_us[1]:.2f}), {'below' if path.below_goal else 'above'} {GOAL_US:g}"
        )
    if chosen.out:
        write_atomic(chosen.out, msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
