"""What one launch costs in Python: CPU time of Kernel.launch against the fake driver of the tests.

    python -m benchmarks.gpu_launch [--out OUT.json]

Needs a C compiler and no GPU. The fake copies 80 bytes of parameters and returns, so what is
measured is the launcher and ctypes; what a real driver adds is not.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, Literal

import msgspec

from lpvit_engines.cuda.kernel import Kernel, open_kernel
from tests.cuda.fake_driver import compile_fake_driver, state_of

ROUNDS, LAUNCHES = 40, 2000
GOAL_US: Final = 5.0


class LaunchTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """CPU microseconds of Python per launch: of `rounds` means over `launches` each, the median,
    the quartiles and the extremes."""

    kind: Literal["gpu_launch"] = "gpu_launch"
    format: Literal[1] = 1
    command: str
    processor: str
    architecture: str
    cores: int
    load_average_1min: float
    python: str
    driver: Literal["fake"] = "fake"
    rounds: int
    launches: int
    median_us: float
    quartiles_us: tuple[float, float]
    range_us: tuple[float, float]
    goal_us: float = GOAL_US


def launch_us(kernel: Kernel, *, launches: int) -> float:
    """CPU microseconds of this thread per launch, as a mean over one round."""
    begin_ns = time.thread_time_ns()
    for _ in range(launches):
        kernel.launch(
            x=0x1000,
            values=0x2000,
            rows=0x3000,
            columns=0x4000,
            bias=0x5000,
            residual=0,
            tokens=197,
            ldx=768,
            ldy=3072,
            y=0x6000,
            block_row_count=48,
            stream=0,
        )
    return (time.thread_time_ns() - begin_ns) / 1e3 / launches


def measured_rounds(*, rounds: int, launches: int) -> list[float]:
    """The mean launch of every round, on a kernel opened once."""
    with tempfile.TemporaryDirectory() as folder:
        library = compile_fake_driver(Path(folder))
        state_of(library)
        with open_kernel(
            block_rows=64, block_cols=64, dtype="float16", library=str(library)
        ) as kernel:
            return [launch_us(kernel, launches=launches) for _ in range(rounds)]


def record_of(rounds_us: list[float], *, launches: int, command: str) -> LaunchTime:
    """The record of measured rounds, at least two, on this machine."""
    low, median, high = statistics.quantiles(rounds_us, n=4)
    return LaunchTime(
        command=command,
        processor=processor(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        load_average_1min=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        rounds=len(rounds_us),
        launches=launches,
        median_us=round(median, 3),
        quartiles_us=(round(low, 3), round(high, 3)),
        range_us=(round(min(rounds_us), 3), round(max(rounds_us), 3)),
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
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    command = "python -m benchmarks.gpu_launch " + " ".join(sys.argv[1:])
    rounds_us = measured_rounds(rounds=chosen.rounds, launches=chosen.launches)
    found = record_of(rounds_us, launches=chosen.launches, command=command.strip())
    print(
        f"{found.median_us:.2f} us a launch (median of {found.rounds} rounds of {found.launches}; "
        f"{found.range_us[0]:.2f} to {found.range_us[1]:.2f}; goal: below {GOAL_US:g})"
    )
    if chosen.out:
        chosen.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
