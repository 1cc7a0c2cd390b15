"""NVML in the variants that boards were seen to show, played by a fake library."""

import pytest

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers.base import opened
from lpvit_profilers.fake_nvml import FakeNvml
from lpvit_profilers.nvml import NvmlSource
from lpvit_profilers.nvml_probe import probe_averaging, probe_update_period
from lpvit_profilers.sampler import poll_interval_s


def source_of(library: FakeNvml, index: int = 0) -> NvmlSource:
    return NvmlSource(index, library=library, sleep=library.sleep, clock=library.clock)


def growing(library_of: list[FakeNvml]) -> int:
    """An energy counter at 100 W that steps every 100 ms."""
    return 7_000_000 + int(library_of[0].now_s * 10 + 1e-9) * 10_000


def test_instant_power_is_preferred_and_the_counter_used() -> None:
    box: list[FakeNvml] = []
    library = FakeNvml(
        instant=lambda: 101_000 + int(box[0].now_s * 40 + 1e-9),  # something new every 25 ms
        average=lambda: 90_000,
        power=lambda: 90_000,
        energy=lambda: growing(box),
    )
    box.append(library)
    with opened(source_of(library)) as source:
        sample, info = source.sample(), source.info
    assert (sample.total_mw, sample.quality) == (101_044.0, "measured")
    assert info.period_s == pytest.approx(0.025)
    assert (info.total_rule, info.scope) == ("GPU board (instant)", "gpu_board")
    assert (info.has_counter, info.averaging_s, info.gain_class) == (True, 0.1, 0.05)
    assert (info.sensor, info.notes) == ("Fake GPU", ())
    assert sample.energy_mj == 7_110_000.0


def test_everything_not_supported_is_refused_and_not_zero() -> None:
    library = FakeNvml()
    with pytest.raises(EnvironmentUnfitError, match="Fake GPU answers no power call"):
        source_of(library).open()
    assert not library.is_up


def test_success_with_zeros_is_refused() -> None:
    library = FakeNvml(instant=lambda: 0, average=lambda: 0, power=lambda: 0, energy=lambda: 0)
    with pytest.raises(EnvironmentUnfitError, match="it answered 0 mW, which no GPU draws"):
        source_of(library).open()


def test_a_power_that_is_a_mean_of_a_second_says_so() -> None:
    library = FakeNvml(power=lambda: 60_000)
    with opened(source_of(library)) as source:
        assert source.info.averaging_s == 1.0
        assert "this power call may be a mean over the last second" in source.info.notes
        assert source.capabilities is not None
        assert source.capabilities.instant == "NVML error 3"
        assert source.capabilities.power is None


def test_a_counter_that_stands_still_is_not_used() -> None:
    library = FakeNvml(instant=lambda: 60_000, energy=lambda: 0)
    with opened(source_of(library)) as source:
        assert not source.info.has_counter
        assert source.info.notes[0] == "no energy counter: it stood at 0 mJ for 300 ms"
        assert source.sample().energy_mj is None


def test_a_power_that_fails_later_is_none_with_a_reason() -> None:
    answers = [50_000]
    library = FakeNvml(instant=lambda: answers[0])
    with opened(source_of(library)) as source:
        assert source.sample().total_mw == 50_000.0
        answers[0] = 0
        sample = source.sample()
    assert (sample.total_mw, sample.quality) == (None, "unavailable")
    assert sample.reason == "it answered 0 mW, which no GPU draws"


def test_conditions_name_what_slows_the_gpu_and_leave_unknown_clocks_out() -> None:
    with opened(source_of(FakeNvml(instant=lambda: 1, reasons=0x04 | 0x40 | 0x01))) as source:
        found = source.conditions()
    assert found.throttling == ("software power cap", "hardware thermal slowdown")
    assert (found.temperature_c, found.clock_mhz) == (55.0, None)


def test_throttling_that_nvml_cannot_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(FakeNvml, "nvmlDeviceGetCurrentClocksEventReasons")
    with opened(source_of(FakeNvml(instant=lambda: 1))) as source:
        assert source.conditions().throttling is None


def test_a_gpu_that_is_not_there_is_refused_in_words() -> None:
    with pytest.raises(EnvironmentUnfitError, match="NVML finds no GPU 3: Invalid Argument"):
        source_of(FakeNvml(instant=lambda: 1), index=3).open()


def test_a_power_that_does_not_move_leaves_the_update_period_assumed() -> None:
    with opened(source_of(FakeNvml(instant=lambda: 60_000))) as source:
        assert source.info.period_s == 0.1
        assert source.info.notes[-1] == (
            "update period taken as 0.1 s: the power changed 0 times in 1 s; probe for longer"
        )


def test_the_averaging_found_on_site_replaces_the_assumed_one() -> None:
    box: list[FakeNvml] = []
    began_s: list[float] = []

    def ramp() -> int:
        busy_s = box[0].now_s - began_s[0] if began_s else 0.0
        return 10_000 + int(90_000 * min(1.0, busy_s / 0.4))

    def load() -> None:
        if not began_s:
            began_s.append(box[0].now_s)

    box.append(FakeNvml(instant=ramp))
    with opened(source_of(box[0])) as source:
        found = source.probe_averaging(load, for_s=2.0)
        assert found.averaging_s == pytest.approx(0.4, rel=0.02)
        assert source.info.averaging_s == found.averaging_s


def test_a_step_that_shows_within_one_update_leaves_a_window_of_one_update() -> None:
    box: list[FakeNvml] = []
    busy_s: list[float] = []

    def stepped() -> int:
        updated_s = int(box[0].now_s / 0.1) * 0.1
        noise = int(box[0].now_s / 0.1) % 7
        return 10_000 + noise + (90_000 if busy_s and updated_s >= busy_s[0] else 0)

    def load() -> None:
        if not busy_s:
            busy_s.append(box[0].now_s)

    box.append(FakeNvml(instant=stepped))
    with opened(source_of(box[0])) as source:
        assert source.info.period_s == pytest.approx(0.1, rel=0.02)
        source.probe_averaging(load, for_s=2.0)
        assert source.info.averaging_s == source.info.period_s
        # so the power is still integrated beside the counter
        assert not source.info.power_from_counter
        assert poll_interval_s(source.info) == pytest.approx(0.05, rel=0.02)


class Simulated:
    """A clock that moves 1 ms a look, and a sensor of a given period and averaging behind it."""

    def __init__(self, *, period_ms: int, window_ms: int) -> None:
        self.now_ms, self._period_ms, self._window_ms = 0, period_ms, window_ms
        self.busy_since_ms: int | None = None

    def clock(self) -> int:
        self.now_ms += 1
        return self.now_ms * 1_000_000

    def load(self) -> None:
        if self.busy_since_ms is None:
            self.busy_since_ms = self.now_ms

    def noisy(self) -> float:
        return 50_000.0 + self.now_ms // self._period_ms

    def averaged(self) -> float:
        at_ms = self.now_ms // self._period_ms * self._period_ms
        busy_ms = 0 if self.busy_since_ms is None else at_ms - self.busy_since_ms
        return 10_000.0 + 90_000.0 * min(1.0, max(0, busy_ms) / self._window_ms)


@pytest.mark.parametrize("period_ms", [20, 100])
def test_the_update_period_is_found(period_ms: int) -> None:
    sensor = Simulated(period_ms=period_ms, window_ms=1)
    found = probe_update_period(sensor.noisy, clock=sensor.clock)
    assert found.update_period_s == period_ms / 1000


def test_a_sensor_that_never_changes_has_an_unknown_period() -> None:
    sensor = Simulated(period_ms=20, window_ms=1)
    found = probe_update_period(lambda: 5.0, clock=sensor.clock)
    assert (found.update_period_s, found.reason) == (
        None,
        "the power changed 0 times in 3 s; probe for longer",
    )


@pytest.mark.parametrize("window_ms", [100, 1000])
def test_the_averaging_window_is_found_from_a_step(window_ms: int) -> None:
    sensor = Simulated(period_ms=2, window_ms=window_ms)
    found = probe_averaging(sensor.averaged, sensor.load, clock=sensor.clock)
    assert found.averaging_s == pytest.approx(window_ms / 1000, rel=0.05)


def test_a_load_that_moves_nothing_gives_no_window() -> None:
    sensor = Simulated(period_ms=2, window_ms=100)
    found = probe_averaging(sensor.averaged, lambda: None, clock=sensor.clock)
    assert found.averaging_s is None
    assert found.reason == "the load moved the reading by 0 mW only; use a heavier one"
