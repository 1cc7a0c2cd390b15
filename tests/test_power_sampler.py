"""The sampling thread: order, jitter, a ring of fixed size, and what it costs."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lpvit_edge.errors import MeasurementError
from lpvit_profilers.base import Conditions, PowerSample, SourceInfo, opened
from lpvit_profilers.jetson_sysfs import JetsonSysfsSource
from lpvit_profilers.rapl import RaplSource
from lpvit_profilers.replay import Recording, ReplaySource
from lpvit_profilers.sampler import Sampler

SYSFS = Path(__file__).parent / "fixtures" / "sysfs"
# The full soak lasts 60 s: LPVIT_SOAK_S=60.
SOAK_S = float(os.environ.get("LPVIT_SOAK_S", "1"))
INFO = SourceInfo(
    name="fake",
    sensor="fake",
    scope="rail",
    quality="measured",
    total_rule="X",
    rails=("X",),
    resolution_mw=None,
    period_s=0.001,
    averaging_s=0.0,
    has_counter=False,
    gain_class=None,
)


class Counting:
    """Gives 0, 1, 2 ... mW at times 0, 1, 2 ... ns; fails where it is told to."""

    def __init__(self, *, missing: int = -1, stuck_at: int = -1, broken_at: int = -1) -> None:
        self.calls = 0
        self._missing, self._stuck_at, self._broken_at = missing, stuck_at, broken_at

    info = INFO

    def open(self) -> None: ...

    def close(self) -> None: ...

    def conditions(self) -> Conditions:
        return Conditions()

    def sample(self) -> PowerSample:
        number = self.calls
        self.calls += 1
        if number == self._broken_at:
            raise MeasurementError("the sensor is gone")
        lost = number == self._missing
        return PowerSample(
            t_ns=number if self._stuck_at < 0 else min(number, self._stuck_at),
            rails_mw={},
            total_mw=None if lost else float(number),
            quality="unavailable" if lost else "measured",
            reason="it slept" if lost else None,
        )


def run_until(sampler: Sampler, source: Counting, calls: int) -> None:
    while source.calls < calls:
        sampler.check()
        time.sleep(0.001)


def test_samples_arrive_in_order() -> None:
    source = Counting()
    with Sampler(source, poll_s=0.0005) as sampler:
        run_until(sampler, source, 20)
    trace = sampler.trace()
    assert trace.t_ns.tolist() == list(range(sampler.count))
    assert trace.power_mw.tolist() == list(range(sampler.count))


def test_the_ring_forgets_the_oldest_and_stays_as_large_as_it_was() -> None:
    source = Counting()
    with Sampler(source, poll_s=0.0005, capacity=8) as sampler:
        run_until(sampler, source, 30)
    trace = sampler.trace()
    assert trace.t_ns.tolist() == list(range(sampler.count - 8, sampler.count))


def test_a_trace_can_begin_later() -> None:
    source = Counting()
    with Sampler(source, poll_s=0.0005) as sampler:
        run_until(sampler, source, 10)
    assert sampler.trace(since_ns=5).t_ns[0] == 5


def test_a_reading_that_failed_is_nan_with_a_reason_and_not_zero() -> None:
    source = Counting(missing=3)
    with Sampler(source, poll_s=0.0005) as sampler:
        run_until(sampler, source, 10)
    assert np.isnan(sampler.trace().power_mw[3])
    assert sampler.last_reason == "it slept"


def test_a_sensor_that_never_moves_is_found_out() -> None:
    def never_moved(readings: list[float]) -> bool:
        samples = (
            PowerSample(t_ns=n, rails_mw={}, total_mw=mw, quality="measured")
            for n, mw in enumerate(readings)
        )
        source = ReplaySource(Recording(info=INFO, samples=tuple(samples)))
        with opened(source), Sampler(source, poll_s=0.0005) as sampler:
            while source.remaining:
                sampler.check()
                time.sleep(0.001)
        return sampler.never_moved

    assert never_moved([5.0] * 20)
    assert not never_moved([5.0] * 20 + [6.0])
    assert not never_moved([5.0] * 10)


def test_a_value_that_is_not_new_is_not_counted_twice() -> None:
    source = Counting(stuck_at=4)
    with Sampler(source, poll_s=0.0005) as sampler:
        run_until(sampler, source, 20)
    assert sampler.trace().t_ns.tolist() == [0, 1, 2, 3, 4]


def test_a_source_that_breaks_is_reported_where_someone_listens() -> None:
    source = Counting(broken_at=3)
    with (
        pytest.raises(MeasurementError, match="the power sampler stopped: the sensor is gone"),
        Sampler(source, poll_s=0.0005) as sampler,
    ):
        run_until(sampler, source, 10)


def test_the_pauses_are_jittered() -> None:
    with opened(JetsonSysfsSource(SYSFS / "orin_nano")) as source:
        with Sampler(source, poll_s=0.01, seed=1) as sampler:
            while sampler.count < 20:
                time.sleep(0.01)
        pauses = np.diff(sampler.trace().t_ns)
    assert len(np.unique(pauses)) > 10


def test_two_sources_run_for_long_in_bounded_memory_and_under_two_percent_of_a_core() -> None:
    process = pytest.importorskip("psutil").Process()
    with (
        opened(JetsonSysfsSource(SYSFS / "agx_orin")) as rails,
        opened(RaplSource(SYSFS / "rapl_server")) as packages,
        Sampler(rails, capacity=4096) as one,
        Sampler(packages, capacity=4096) as two,
    ):
        time.sleep(min(1.0, SOAK_S))
        before_bytes, begin_s = process.memory_info().rss, time.monotonic()
        spent_s, counted = one.cpu_s + two.cpu_s, one.count + two.count
        time.sleep(SOAK_S)
        length_s = time.monotonic() - begin_s
        spent_s = one.cpu_s + two.cpu_s - spent_s
        counted = one.count + two.count - counted
        grown_bytes = process.memory_info().rss - before_bytes
    share = spent_s / length_s
    sys.stdout.write(
        f"soak {length_s:.1f} s: {counted} samples, {share:.2%} of a core, "
        f"{grown_bytes // 1024} KiB grown\n"
    )
    assert counted > 0
    assert grown_bytes < 4 << 20
    if SOAK_S >= 30:  # in a second, one disturbance decides
        assert share < 0.02
