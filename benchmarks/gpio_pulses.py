"""When the pulses of the GPIO sink begin and how long they last, under three loads.

python benchmarks/gpio_pulses.py runs/demo --seconds 60 --out benchmarks/results/gpio_pulses.json

There is no chip: a stand-in takes the kernel's place and notes when it is told which level. So what
is measured is the sink's thread on this machine; the call into the kernel and the valve are not.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import gpiod
import msgspec
import numpy as np

from lpvit_edge.bundle import open_bundle
from lpvit_edge.line.config import line_config
from lpvit_edge.line.line import Line
from lpvit_edge.line.records import FrameRecord, StageLatency
from lpvit_edge.line.sink_config import GpioSink
from lpvit_edge.line.sinks.gpio import GpioReject

ROOT = Path(__file__).resolve().parent.parent
CAMERA = ROOT / "examples" / "factory_line" / "camera.py"
SINK = GpioSink(target="/dev/gpiochip0", line=17, delay_ms=300.0, pulse_ms=5.0, tolerance_ms=10.0)


class Chip:
    """Stands in for gpiod's request: notes each level and when it was set, CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, bool]] = []

    def request_lines(self, path: str, **_: Any) -> "Chip":
        return self

    def set_value(self, line: int, value: Any) -> None:
        self.changes.append((time.monotonic_ns(), value.name == "ACTIVE"))

    def release(self) -> None:
        """Nothing is held."""


def alone(*, seconds: float, rate: float) -> tuple[list[int], int]:
    """The sink without a line: rejects at the rate, known long before their pulse is due.

    Due times of all, in nanoseconds, and how many got no pulse.
    """
    sink = GpioReject(SINK)
    due: list[int] = []
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        now_ns = time.monotonic_ns()
        sink.deliver(reject(len(due) + 1, now_ns), None)
        due.append(now_ns + round(SINK.delay_ms * 1e6))
        time.sleep(1.0 / rate)
    sink.close(5.0)
    return due, sink.missed


def reject(number: int, now_ns: int) -> FrameRecord:
    return FrameRecord(
        number=number, source="benchmark", captured_at=time.time(), captured_ns=now_ns,
        verdict="reject", action="reject", latency=StageLatency(total_ms=0.0),
    )  # fmt: skip


def behind_a_line(bundle: Path, *, seconds: float, rate: float) -> tuple[list[int], int]:
    """The sink of a whole line whose engine judges in the same process."""
    with tempfile.TemporaryDirectory() as folder:
        tables = {
            "state": folder,
            "source": {"kind": "synthetic", "target": f"{CAMERA}:frame", "rate": rate},
            "policy": {"kind": "triggered", "queue": 32, "deadline_ms": 250.0},
            "verdict": {"min_confidence": 1.0},  # which no softmax reaches: all are rejected
            "sink": [{"kind": "gpio", **msgspec.to_builtins(SINK)}],
        }
        line = Line(open_bundle(bundle), line_config(tables, name="benchmark"))
        (sink,) = line.outputs.sinks
        line.start()
        end_s = time.monotonic() + seconds
        line.run(each=lambda: line.request_stop() if time.monotonic() > end_s else None)
        frames = [
            msgspec.json.decode(entry.body, type=FrameRecord)
            for entry in line.journal.after(0, limit=1_000_000)
            if entry.kind == "frame"
        ]
        line.close()
    timed = [one for one in frames if one.action == "reject" and not one.untimed]
    return [one.captured_ns + round(SINK.delay_ms * 1e6) for one in timed], sink.missed


def spin(stop: Any) -> None:
    while not stop.is_set():
        sum(range(10_000))


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """As many processes that never rest as this machine has cores."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    processes = [context.Process(target=spin, args=(stop,)) for _ in range(os.cpu_count() or 1)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        stop.set()
        for process in processes:
            process.join()


def summary(chip: Chip, due_ns: list[int], missed: int) -> dict[str, object]:
    """How late pulses began, and how much longer than asked for they lasted, in milliseconds."""
    begun = [at for at, active in chip.changes if active]
    ended = [at for at, active in chip.changes if not active]
    due = np.sort(np.asarray(due_ns, np.int64))
    # A pulse belongs to the newest part that was due when it began; parts that come while one runs
    # prolong it and begin none.
    of = np.searchsorted(due, np.asarray(begun, np.int64), side="right") - 1
    late_ms = [
        float(at - due[index]) / 1e6 for at, index in zip(begun, of, strict=True) if index >= 0
    ]
    long_ms = [
        (end - begin) / 1e6 - SINK.pulse_ms for begin, end in zip(begun, ended, strict=False)
    ]
    return {
        "rejects": len(due),
        "pulses": len(begun),
        "without_pulse": missed,
        "late_ms": percentiles(late_ms),
        "longer_ms": percentiles(long_ms),
    }


def percentiles(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    names = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9, "largest": 100.0}
    return {name: round(float(np.percentile(values, q)), 3) for name, q in names.items()}


def measure(bundle: Path, *, seconds: float, rate: float) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in ("the sink alone", "behind a line", "behind a line, every core busy"):
        chip = Chip()
        before = os.getloadavg()[0]
        with (
            mock.patch.object(gpiod, "request_lines", chip.request_lines),
            busy_cores() if "busy" in name else contextlib.nullcontext(),
        ):
            if name == "the sink alone":
                due, missed = alone(seconds=seconds, rate=rate)
            else:
                due, missed = behind_a_line(bundle, seconds=seconds, rate=rate)
        found[name] = summary(chip, due, missed) | {
            "load_average": {"before": before, "after": os.getloadavg()[0]}
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=30.0, help="parts per second, all rejected")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = {
        "command": "python benchmarks/gpio_pulses.py " + " ".join(sys.argv[1:]),
        "chip": "a stand-in: no kernel, no GPIO",
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "delay_ms": SINK.delay_ms,
        "pulse_ms": SINK.pulse_ms,
        "tolerance_ms": SINK.tolerance_ms,
        "loads": measure(arguments.bundle, seconds=arguments.seconds, rate=arguments.rate),
    }
    text = json.dumps(found, indent=1) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
