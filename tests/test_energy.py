"""Energy per call, from sources whose power follows the work exactly."""

import time
from itertools import groupby
from typing import Any

import msgspec
import pytest

from lpvit_edge.errors import UnknownOptionError
from lpvit_profilers.base import (
    STUCK,
    STUCK_AFTER,
    Conditions,
    PowerSample,
    Quality,
    SourceInfo,
)
from lpvit_profilers.energy import measure_energies, measure_energy
from lpvit_profilers.energy_records import EnergyMeasurement
from lpvit_profilers.nvml_probe import SensorTiming
from lpvit_profilers.uncertainty import confidence95, resolution_term_mw, standard_deviation

IDLE_MW, BUSY_MW = 4_000.0, 10_000.0
CALL_S = 0.004


class Bench:
    """A device that draws more while it works, and a sensor that sees it at once.

    The counter, if there is one, steps every 10 ms like that of a GPU every 100 ms.
    """

    def __init__(
        self,
        *,
        has_counter: bool = False,
        averaging_s: float = 0.0,
        is_silent: bool = False,
        is_flat: bool = False,
        power_scale: float = 1.0,
        counter_stands: bool = False,
        counter_resets: bool = False,
        counter_gaps: bool = False,
        power_from_counter: bool = False,
        quality: Quality = "measured",
        conditions: Conditions | None = None,
        clocks_mhz: tuple[float, ...] = (),
        throttled_at_work: bool = False,
    ) -> None:
        self.busy = False
        self._silent, self._flat, self._scale = is_silent, is_flat, power_scale
        self._stands = counter_stands
        self._resets, self._gaps = counter_resets, counter_gaps
        self._quality: Quality = quality
        self._conditions = conditions or Conditions()
        self._clocks_mhz = list(clocks_mhz)
        self._throttled_at_work = throttled_at_work
        self._reads = 0
        self._energy_mj, self._since_s = 0.0, time.monotonic()
        self._tick_mj, self._tick_s = 0.0, self._since_s
        self.info = SourceInfo(
            name="bench",
            sensor="bench",
            scope="module_input",
            quality=quality,
            total_rule="VDD_IN",
            rails=("VDD_IN",),
            resolution_mw=40.0,
            period_s=0.01,
            averaging_s=averaging_s,
            has_counter=has_counter,
            power_from_counter=power_from_counter,
            gain_class=0.05 if has_counter else None,
        )

    def open(self) -> None: ...

    def close(self) -> None: ...

    def conditions(self) -> Conditions:
        if self._throttled_at_work and self.busy:
            return Conditions(throttling=("power brake",))
        if self._clocks_mhz:
            clock = self._clocks_mhz.pop(0)
            return msgspec.structs.replace(self._conditions, clock_mhz=clock)
        return self._conditions

    def work(self) -> None:
        self._account(busy=True)
        time.sleep(CALL_S)
        self._account(busy=False)

    def _account(self, *, busy: bool) -> None:
        now_s = time.monotonic()
        self._energy_mj += (BUSY_MW if self.busy else IDLE_MW) * (now_s - self._since_s)
        self.busy, self._since_s = busy, now_s
        if now_s - self._tick_s >= 0.01:
            self._tick_mj, self._tick_s = self._energy_mj, now_s

    def sample(self) -> PowerSample:
        self._reads += 1
        power_mw = (BUSY_MW if self.busy else IDLE_MW) * self._scale
        if not self._flat:
            power_mw += (self._reads % 5 - 2) * 0.01  # the noise of a real sensor
        if not self.busy and self.info.has_counter:
            self._account(busy=False)
        return PowerSample(
            t_ns=time.monotonic_ns(),
            rails_mw={"VDD_IN": power_mw},
            total_mw=None if self._silent else power_mw,
            quality="unavailable" if self._silent else self._quality,
            energy_mj=self._counter_mj() if self.info.has_counter else None,
            counter_gaps=self._reads if self._gaps else 0,
            reason="the domain is off" if self._silent else None,
        )

    def _counter_mj(self) -> float:
        """Falling throughout stands for a counter that was reset in every window."""
        return 1.0 if self._stands else -self._tick_mj if self._resets else self._tick_mj


# A busy machine may suspend the work between two calls, where the fake rests; its sensor sees
# that, rightly. So the power is bounded loosely, and the relations between numbers exactly.
NEARLY = 0.25
SUSPENDED = ("the sensor gave nothing for", "do not cover the whole window", "fewer than two")


def measured(bench: Bench, *, repeats: int = 2, window_s: float = 0.4) -> EnergyMeasurement:
    """Measure again where the machine suspended the sampler itself, which is no one's fault."""

    def once() -> EnergyMeasurement:
        return measure_energy(
            bench.work, bench, window_s=window_s, repeats=repeats, max_warmup_s=0.1, seed=1
        )

    found = once()
    for _ in range(4):
        if not any(text in reason for text in SUSPENDED for reason in found.reasons):
            break
        found = once()
    return found


def test_energy_is_power_times_time_gross_and_above_idle() -> None:
    found = measured(Bench(), repeats=1)
    assert found.latency_ms is not None
    assert found.mean_power_mw == pytest.approx(BUSY_MW, rel=NEARLY)
    assert found.idle_before_mw == pytest.approx(IDLE_MW, rel=1e-3)
    assert found.idle_after_mw == pytest.approx(IDLE_MW, rel=1e-3)
    assert found.mean_power_mw is not None
    call_s = found.latency_ms / 1e3
    assert found.gross_mj == pytest.approx(found.mean_power_mw * call_s)
    assert found.net_mj == pytest.approx((found.mean_power_mw - IDLE_MW) * call_s, rel=1e-3)


def test_a_result_carries_what_is_needed_to_judge_it() -> None:
    found = measured(Bench())
    assert (found.source, found.scope, found.quality) == ("bench", "module_input", "measured")
    assert (found.total_rule, found.resolution_mw, found.window_s) == ("VDD_IN", 40.0, 0.4)
    assert len(found.repeats) == 2
    assert all(r.samples > 5 and r.calls > 5 for r in found.repeats)
    assert found.uncertainty is not None
    assert found.uncertainty.gain_mj is None
    assert found.gross_mj is not None
    assert found.uncertainty.edge_mj == pytest.approx(found.gross_mj * 0.01 / 0.4)
    assert found.dt_p50_ms is not None
    assert "sensor not calibrated" in found.describe()


def test_a_counter_is_read_from_step_to_step_and_agrees_with_the_integral() -> None:
    bench = Bench(has_counter=True)
    bench.info = msgspec.structs.replace(bench.info, averaging_s=0.001)
    found = measured(bench)
    for repeat in found.repeats:
        assert repeat.counter_mj is not None
        assert repeat.integral_mj == pytest.approx(repeat.counter_mj, rel=NEARLY)
        assert repeat.energy_mj == repeat.counter_mj
    assert found.mean_power_mw == pytest.approx(BUSY_MW, rel=NEARLY)
    assert found.uncertainty is not None
    assert found.gross_mj is not None
    assert found.uncertainty.gain_mj == pytest.approx(0.05 * found.gross_mj)
    assert "± 5% (sensor)" in found.describe()


def test_two_methods_that_disagree_are_not_trusted() -> None:
    bench = Bench(has_counter=True, power_scale=1.3)
    bench.info = msgspec.structs.replace(bench.info, averaging_s=0.001)
    found = measured(bench)
    assert not found.trusted
    assert any("the integrated power differ by" in reason for reason in found.reasons)


@pytest.mark.parametrize(("resets", "gaps"), [(True, False), (False, True)])
def test_a_counter_that_was_reset_or_lost_count_gives_way_to_the_integral(
    resets: bool, gaps: bool
) -> None:
    bench = Bench(has_counter=True, averaging_s=0.05, counter_resets=resets, counter_gaps=gaps)
    found = measured(bench)
    assert all(repeat.counter_mj is None for repeat in found.repeats)
    assert found.mean_power_mw == pytest.approx(BUSY_MW, rel=NEARLY)
    assert any("was reset, or lost count" in reason for reason in found.reasons)


def test_without_an_integral_a_counter_that_lost_count_gives_no_energy() -> None:
    found = measured(Bench(has_counter=True, power_from_counter=True, counter_gaps=True))
    assert (found.gross_mj, found.quality) == (None, "unavailable")
    assert any("was reset, or lost count" in reason for reason in found.reasons)


def test_a_counter_that_stands_still_gives_way_to_the_integral() -> None:
    bench = Bench(has_counter=True, counter_stands=True)
    bench.info = msgspec.structs.replace(bench.info, averaging_s=0.001)
    found = measured(bench, repeats=1)
    assert found.gross_mj is not None
    assert found.repeats[0].counter_mj is None
    assert any("the energy counter stood still" in reason for reason in found.reasons)


def test_a_silent_sensor_gives_no_energy_and_says_why() -> None:
    found = measured(Bench(is_silent=True), repeats=1)
    assert (found.gross_mj, found.net_mj, found.mean_power_mw) == (None, None, None)
    assert (found.quality, found.trusted) == ("unavailable", False)
    assert "a repeat was rejected: the domain is off" in found.reasons
    assert found.describe().startswith("no energy: ")


def test_a_reading_that_never_moves_is_not_trusted() -> None:
    bench = Bench(is_flat=True)
    bench.busy = True
    found = measure_energy(
        lambda: time.sleep(CALL_S), bench, window_s=1.0, repeats=1, max_warmup_s=0.1, idle_s=0.1
    )
    assert any("the sensor's reading never moved" in reason for reason in found.reasons)
    assert (found.quality, found.trusted) == ("suspect", False)


def test_an_estimate_that_never_moves_stays_an_estimate() -> None:
    bench = Bench(is_flat=True, quality="estimated")
    bench.busy = True
    found = measure_energy(
        lambda: time.sleep(CALL_S), bench, window_s=1.0, repeats=1, max_warmup_s=0.1, idle_s=0.1
    )
    assert found.repeats[0].samples >= STUCK_AFTER
    assert found.quality == "estimated"
    assert STUCK not in found.reasons


def test_several_are_measured_in_turns_and_each_gets_its_own_energy() -> None:
    bench = Bench()
    turns: list[str] = []

    def idle() -> None:
        turns.append("idle")
        time.sleep(CALL_S)

    def busy() -> None:
        turns.append("busy")
        bench.work()

    found = measure_energies(
        {"idle": idle, "busy": busy}, bench, window_s=0.3, repeats=2, max_warmup_s=0.1, seed=1
    )
    assert [name for name, _ in groupby(turns)] == ["idle", "busy", "idle", "busy", "idle"]
    idle_mw, busy_mw = (found[name].mean_power_mw for name in ("idle", "busy"))
    assert idle_mw == pytest.approx(IDLE_MW, rel=NEARLY)
    assert busy_mw == pytest.approx(BUSY_MW, rel=NEARLY)


def test_a_throttled_repeat_is_rejected() -> None:
    found = measured(Bench(conditions=Conditions(throttling=("power brake",))), repeats=1)
    assert found.gross_mj is None
    assert "a repeat was rejected: the device was throttled (power brake)" in found.reasons
    assert found.repeats[0].energy_mj is not None


def test_throttling_that_ends_with_the_work_is_seen() -> None:
    bench = Bench(throttled_at_work=True)
    found = measured(bench, repeats=1)
    assert bench.conditions().throttling is None
    assert found.gross_mj is None
    assert "a repeat was rejected: the device was throttled (power brake)" in found.reasons


def test_a_clock_that_moves_is_not_trusted() -> None:
    clocks = tuple(1000.0 - 20 * n for n in range(40))
    found = measured(Bench(clocks_mhz=clocks))
    assert any(reason.startswith("the clock moved between") for reason in found.reasons)
    assert found.clock_min_mhz is not None
    assert found.clock_p50_mhz is not None
    assert found.clock_min_mhz < found.clock_p50_mhz


def test_a_sensor_that_looks_back_loses_the_edges_of_the_window() -> None:
    found = measured(Bench(averaging_s=0.5), repeats=1, window_s=1.5)
    assert found.mean_power_mw == pytest.approx(BUSY_MW, rel=NEARLY)


def test_a_sensor_that_can_tell_how_far_it_looks_back_is_asked_with_the_work_itself() -> None:
    class Probed(Bench):
        asked_s: float | None = None

        def probe_averaging(self, load: Any, *, for_s: float) -> SensorTiming:
            assert not self.busy
            self.asked_s = for_s
            load()
            self.info = msgspec.structs.replace(self.info, averaging_s=0.1)
            return SensorTiming(update_period_s=None, averaging_s=0.1, reason=self.failure)

        failure: str | None = None

    bench = Probed()
    found = measured(bench)
    assert bench.asked_s == 0.4  # the window's length, where that is short
    assert found.mean_power_mw == pytest.approx(BUSY_MW, rel=NEARLY)
    bench.failure = "use a heavier one"
    assert (
        "how far back a reading looks was not found (use a heavier one); it is taken as 0.1 s"
        in measured(bench).reasons
    )


def test_the_lengths_of_a_loop_have_names() -> None:
    from lpvit_edge.options import window_s

    assert [window_s(name) for name in ("quick", "default", "reference")] == [3.0, 10.0, 60.0]
    with pytest.raises(UnknownOptionError, match="quick, default, reference"):
        window_s("long")


def test_suspect_readings_stay_suspect_in_the_result() -> None:
    found = measured(Bench(quality="suspect"), repeats=1)
    assert found.quality == "suspect"
    assert not found.trusted


def test_an_estimate_stays_an_estimate_in_the_result() -> None:
    found = measured(Bench(quality="estimated"), repeats=1)
    assert found.quality == "estimated"
    assert found.describe().endswith("estimated")


def test_a_line_for_people_has_no_more_digits_than_the_gross_energy() -> None:
    found = msgspec.structs.replace(
        measured(Bench(), repeats=1), gross_mj=185.37, net_mj=90.24, ci95_mj=2.04, gain_class=0.05
    )
    assert found.describe() == (
        "185 mJ ± 2 (repeats), ± 5% (sensor), 90 mJ above idle, bench, module_input, measured"
    )
    small = msgspec.structs.replace(found, gross_mj=1.8537, net_mj=1e-13, ci95_mj=0.0204)
    assert small.describe().startswith("1.85 mJ ± 0.02 (repeats), ± 5% (sensor), 0.00 mJ above")


def test_one_repeat_has_no_spread() -> None:
    found = measured(Bench(), repeats=1)
    assert (found.ci95_mj, found.sd_mj) == (None, None)
    assert found.uncertainty is not None
    assert found.uncertainty.repeat_mj is None


@pytest.mark.parametrize("wrong", [{"window_s": 0.0}, {"repeats": 0}])
def test_a_measurement_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both must be above 0"):
        measure_energy(lambda: None, Bench(), **wrong)


def test_a_result_survives_json() -> None:
    found = measured(Bench(), repeats=1)
    assert msgspec.json.decode(msgspec.json.encode(found), type=EnergyMeasurement) == found


def test_the_confidence_interval_uses_students_t() -> None:
    values = [10.0, 11.0, 9.0, 10.0, 10.0]
    assert standard_deviation(values) == pytest.approx(0.5**0.5)
    assert confidence95(values) == pytest.approx(2.776 * 0.5**0.5 / 5**0.5)
    assert confidence95([1.0]) is None


def test_rounding_averages_out_only_where_the_reading_moves() -> None:
    assert resolution_term_mw(40.0, samples=500, distinct=9) == pytest.approx(0.5164, rel=1e-3)
    assert resolution_term_mw(40.0, samples=500, distinct=1) == 40.0
    assert resolution_term_mw(None, samples=500, distinct=9) is None
