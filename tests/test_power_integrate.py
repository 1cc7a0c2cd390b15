"""Irregular samples to energy, and the aliasing that jitter is there to prevent."""

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lpvit_profilers.base import SourceInfo
from lpvit_profilers.integrate import mean_power, phase_balanced_mean
from lpvit_profilers.sampler import SHORTEST_POLL_S, jittered, poll_interval_s

if TYPE_CHECKING:
    from numpy.typing import NDArray

S = 1_000_000_000


def mean(t_s: list[float], power_mw: list[float], begin_s: float, end_s: float) -> float | None:
    return mean_power(
        np.asarray(np.asarray(t_s) * S, np.int64),
        np.asarray(power_mw, np.float64),
        begin_ns=int(begin_s * S),
        end_ns=int(end_s * S),
    ).power_mw


def test_a_constant_power_is_its_own_mean_whatever_the_times() -> None:
    assert mean([0, 0.1, 0.15, 0.4, 0.41, 0.9], [7.0] * 6, 0.05, 0.8) == pytest.approx(7.0)


def test_irregular_samples_are_weighted_by_their_distance() -> None:
    # 0 to 0.1 s at 0, a ramp to 0.5 s, then 10: (0 + 0.4 * 5 + 0.4 * 10) / 0.9
    assert mean([0, 0.1, 0.5, 0.9], [0, 0, 10, 10], 0, 0.9) == pytest.approx(6 / 0.9)


def test_edges_between_samples_are_interpolated() -> None:
    assert mean([0.0, 0.4], [0.0, 8.0], 0.1, 0.3) == pytest.approx(4.0)


def test_a_power_since_boot_keeps_its_digits() -> None:
    t0 = 10_000_000.0  # a hundred days of uptime
    assert mean([t0, t0 + 0.001], [1.0, 3.0], t0, t0 + 0.001) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("t_s", "power", "reason"),
    [
        ([0, 0.1, 0.8, 0.9], [1.0] * 4, "the sensor gave nothing for 0.70 s"),
        ([0, 0.3, 0.6, 0.9], [1.0, np.nan, 1.0, 1.0], "the sensor gave nothing for 0.60 s"),
        ([0.5, 0.6, 0.9], [1.0] * 3, "do not cover the whole window"),
        ([0, 0.1, 0.2], [1.0] * 3, "do not cover the whole window"),
        ([0.2], [1.0], "fewer than two readings"),
        ([0, 0.5, 0.9], [np.nan] * 3, "fewer than two readings"),
    ],
    ids=["gap", "failed-reading", "late", "early", "single", "all-failed"],
)
def test_what_was_not_seen_is_unknown(t_s: list[float], power: list[float], reason: str) -> None:
    found = mean_power(
        np.asarray(np.asarray(t_s) * S, np.int64),
        np.asarray(power),
        begin_ns=int(0.05 * S),
        end_ns=int(0.85 * S),
    )
    assert found.power_mw is None
    assert found.reason is not None
    assert reason in found.reason


def square_wave(
    period_s: float, *, poll_s: float, is_jittered: bool, seed: int
) -> "tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]":
    """Times and powers of point samples over 10 s of 15 W for 60 % of a period, else 6 W.

    Third: when the calls begin, at a moment that no edge of the wave nor any bound between two
    phases falls on. Mean power is 11.4 W.
    """
    generator = random.Random(seed)
    phase_s, t_s, now_s = generator.uniform(0, period_s), [], 0.0
    while now_s <= 10.0 + 2 * poll_s:
        t_s.append(now_s)
        now_s += jittered(poll_s, generator) if is_jittered else poll_s
    t = np.asarray(t_s)
    power_mw = np.where((t + phase_s) % period_s < 0.6 * period_s, 15_000.0, 6_000.0)
    calls = np.arange(-phase_s - 0.65 * period_s, 10.0 + period_s, period_s)
    return (t * S).astype(np.int64), power_mw, (calls * S).astype(np.int64)


# The periods of a fast loop, an odd one, and a paced camera at 30 frames a second.
@pytest.mark.parametrize("period_ms", [10.0, 13.7, 33.3])
def test_jittered_polling_stays_within_5_percent_in_10_s(period_ms: float) -> None:
    errors = []
    for seed in range(150):
        t_ns, power_mw, calls_ns = square_wave(
            period_ms / 1e3, poll_s=SHORTEST_POLL_S, is_jittered=True, seed=seed
        )
        found = phase_balanced_mean(t_ns, power_mw, calls_ns=calls_ns).power_mw
        assert found is not None
        errors.append(abs(found / 11_400.0 - 1))
    assert max(errors) < 0.05


def test_balancing_the_phases_halves_the_error_of_plain_trapezoids() -> None:
    plain, balanced = [], []
    for seed in range(150):
        t_ns, power_mw, calls_ns = square_wave(
            0.010, poll_s=SHORTEST_POLL_S, is_jittered=True, seed=seed
        )
        mean = mean_power(t_ns, power_mw, begin_ns=0, end_ns=10 * S).power_mw
        plain.append((mean or 0.0) / 11_400.0 - 1)
        mean = phase_balanced_mean(t_ns, power_mw, calls_ns=calls_ns).power_mw
        balanced.append((mean or 0.0) / 11_400.0 - 1)
    assert np.std(balanced) < 0.6 * np.std(plain)


@pytest.mark.parametrize("period_ms", [10.0, 33.3])
def test_regular_polling_aliases_so_the_jitter_is_needed(period_ms: float) -> None:
    errors = []
    for seed in range(150):
        t_ns, power_mw, _ = square_wave(period_ms / 1e3, poll_s=0.1, is_jittered=False, seed=seed)
        found = mean_power(t_ns, power_mw, begin_ns=0, end_ns=10 * S).power_mw
        assert found is not None
        errors.append(abs(found / 11_400.0 - 1))
    assert max(errors) > 0.30


def test_a_sensor_in_step_with_the_work_is_found_out() -> None:
    t_ns, power_mw, calls_ns = square_wave(0.010, poll_s=0.02, is_jittered=False, seed=1)
    found = phase_balanced_mean(t_ns, power_mw, calls_ns=calls_ns)
    assert found.power_mw is None
    assert found.samples >= 500
    assert found.phases_seen <= 2  # rounding to whole ns may straddle two phases


def test_samples_outside_the_calls_do_not_count() -> None:
    found = phase_balanced_mean(
        np.asarray([0, 5, 30], np.int64),
        np.asarray([1.0, 2.0, 3.0]),
        calls_ns=np.asarray([10, 20], np.int64),
    )
    assert (found.power_mw, found.samples) == (None, 0)


@pytest.mark.parametrize(
    ("period_s", "from_counter", "poll_s"),
    [
        (0.001, False, 0.02),
        (0.0066, False, 0.02),
        (0.1, False, 0.05),
        (1.0, False, 0.5),
        (0.001, True, 0.1),
    ],
)
def test_a_source_is_polled_twice_per_update_and_at_most_50_times_a_second(
    period_s: float, from_counter: bool, poll_s: float
) -> None:
    info = SourceInfo(
        name="x",
        sensor="x",
        scope="rail",
        quality="measured",
        total_rule=None,
        rails=(),
        resolution_mw=None,
        period_s=period_s,
        averaging_s=0.0,
        has_counter=from_counter,
        power_from_counter=from_counter,
        gain_class=None,
    )
    assert poll_interval_s(info) == poll_s
