"""Latency, with a clock that only moves when the measured thing says so."""

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import msgspec
import pytest

from lpvit_edge.errors import MeasurementError
from lpvit_profilers.latency import LatencyMeasurement, measure_alternating, measure_latency

MS = 1_000_000


class FakeTime:
    """A clock, and callables that take a scripted time."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.calls: list[str] = []

    def clock(self) -> int:
        return self.now_ns

    def taking(self, durations_ns: Iterator[int], *, name: str = "run") -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now_ns += next(durations_ns)

        return run


def test_a_steady_call_has_its_exact_latency_and_is_stable() -> None:
    fake = FakeTime()
    found = measure_latency(fake.taking(repeat(2 * MS)), min_time_s=0.1, clock=fake.clock)
    assert found.samples_ms == (2.0,) * 50
    assert (found.median_ms, found.p90_ms, found.p99_ms, found.mad_ms) == (2.0, 2.0, 2.0, 0.0)
    assert (found.calls_per_sample, found.mean_ms) == (1, 2.0)
    assert (found.stable, found.reasons) == (True, ())


def test_slow_first_calls_stay_out_of_the_samples() -> None:
    fake = FakeTime()
    durations = chain([900 * MS], repeat(20 * MS, 6), repeat(2 * MS))
    found = measure_latency(fake.taking(durations), min_time_s=0.1, clock=fake.clock)
    assert set(found.samples_ms) == {2.0}
    assert found.stable


def test_a_short_call_is_repeated_inside_one_sample() -> None:
    fake = FakeTime()
    found = measure_latency(fake.taking(repeat(1_000)), min_time_s=0.01, clock=fake.clock)
    assert found.calls_per_sample == 128  # the first power of two that lasts 100 us
    assert found.median_ms == 0.001


def test_percentiles_and_spread_come_from_the_raw_samples() -> None:
    fake = FakeTime()
    settled = repeat(10 * MS, 1 + 1 + 10)  # first call, calibration, two blocks of five
    durations = chain(settled, [d * MS for d in (8, 9, 10, 11, 12)], repeat(10 * MS))
    found = measure_latency(
        fake.taking(durations), min_time_s=0.05, min_samples=5, clock=fake.clock
    )
    assert found.samples_ms == (8.0, 9.0, 10.0, 11.0, 12.0)
    assert (found.median_ms, found.mad_ms) == (10.0, 1.0)
    assert found.p90_ms == pytest.approx(11.6)
    assert found.p99_ms == pytest.approx(11.96)


@pytest.mark.parametrize(
    ("measured", "complaint"),
    [
        ([10.0] * 98 + [80.0] * 2, "the slowest of a hundred takes 8.0 times the median"),
        ([10.0] * 50 + [12.0] * 50, "the second half ran at 12 ms and the first at 10 ms"),
        ([8.0, 12.0] * 50, "half of the samples lie more than 20% from the median"),
    ],
    ids=["outlier", "drift", "spread"],
)
def test_a_doubtful_measurement_says_why(measured: list[float], complaint: str) -> None:
    fake = FakeTime()
    durations = chain(repeat(10 * MS, 2 + 20), [int(d * MS) for d in measured], repeat(10 * MS))
    found = measure_latency(
        fake.taking(durations), min_time_s=1.0, min_samples=100, clock=fake.clock
    )
    assert not found.stable
    assert any(complaint in reason for reason in found.reasons), found.reasons


def test_too_few_samples_are_a_reason() -> None:
    fake = FakeTime()
    found = measure_latency(
        fake.taking(repeat(10 * MS)), min_time_s=0.01, min_samples=3, clock=fake.clock
    )
    assert found.reasons == ("there are only 3 samples; measure for longer",)


def test_a_warm_up_that_never_settles_ends_and_says_so() -> None:
    fake = FakeTime()
    growing = (int(MS * 1.2**i) for i in range(10_000))
    found = measure_latency(
        fake.taking(growing), min_time_s=0.01, max_warmup_s=0.2, clock=fake.clock
    )
    assert "the warm-up did not settle in" in found.reasons[0]


def test_a_clock_that_stands_still_is_refused() -> None:
    with pytest.raises(MeasurementError, match="check that the clock advances"):
        measure_latency(lambda: None, clock=lambda: 0)


@pytest.mark.parametrize("wrong", [{"min_time_s": 0.0}, {"min_samples": 0}])
def test_a_measurement_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        measure_latency(lambda: None, **wrong)  # type: ignore[arg-type]


def test_alternating_runs_take_turns_and_reverse_every_round() -> None:
    fake = FakeTime()
    runs = {
        "a": fake.taking(repeat(10 * MS), name="a"),
        "b": fake.taking(repeat(20 * MS), name="b"),
    }
    found = measure_alternating(runs, min_time_s=0.08, rounds=4, min_samples=4, clock=fake.clock)
    # Warm-up is 12 calls each; then a block is one call that is not timed and the timed ones.
    assert "".join(fake.calls[24:]) == "aaabb" + "bbaaa" + "aaabb" + "bbaaa"
    assert found["a"].samples_ms == (10.0,) * 8
    assert found["b"].samples_ms == (20.0,) * 4


def test_alternating_keeps_the_ratio_when_the_machine_slows_down() -> None:
    fake = FakeTime()

    def slowing(base_ns: int) -> Callable[[], None]:
        def run() -> None:
            fake.now_ns += int(base_ns * (1 + fake.now_ns / 4e9))

        return run

    runs = {"a": slowing(MS), "b": slowing(2 * MS)}
    found = measure_alternating(runs, min_time_s=1.0, clock=fake.clock)
    assert found["b"].median_ms / found["a"].median_ms == pytest.approx(2.0, rel=0.02)
    assert not found["a"].stable


def test_a_measurement_survives_json() -> None:
    fake = FakeTime()
    found = measure_latency(fake.taking(repeat(2 * MS)), min_time_s=0.1, clock=fake.clock)
    assert msgspec.json.decode(msgspec.json.encode(found), type=LatencyMeasurement) == found
