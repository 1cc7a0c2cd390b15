from itertools import product

import pytest

pytest.importorskip("scipy")

from lpvit_edge.allocate import (
    Option,
    Options,
    by_milp,
    by_slope,
    by_uniform,
    interpolated_latency,
)
from lpvit_edge.budget import latency_budget_ms
from lpvit_edge.errors import BudgetNotMetError, UnknownOptionError
from lpvit_edge.records import GemmCost


def layer(*pairs: tuple[float, float]) -> tuple[Option, ...]:
    """Dense at 1 ms, then 64x1 at rising sparsity with (latency, distortion)."""
    dense = Option(pattern="dense", sparsity=0.0, latency_ms=1.0, distortion=0.0)
    return dense, *(
        Option(pattern="64x1", sparsity=0.25 * (i + 1), latency_ms=ms, distortion=d)
        for i, (ms, d) in enumerate(pairs)
    )


OPTIONS: Options = (
    layer((0.8, 0.1), (0.5, 0.9), (0.3, 4.0)),
    layer((0.9, 0.3), (0.6, 0.5), (0.2, 0.8)),
    layer((0.7, 2.0), (0.4, 2.5)),
)


def total(picks: tuple[int, ...]) -> tuple[float, float]:
    chosen = [options[pick] for options, pick in zip(OPTIONS, picks, strict=True)]
    return sum(o.latency_ms for o in chosen), sum(o.distortion for o in chosen)


@pytest.mark.parametrize("budget_ms", [3.0, 2.5, 2.0, 1.7, 1.3, 0.9])
def test_milp_finds_the_optimum_of_an_exhaustive_search(budget_ms: float) -> None:
    every = product(*(range(len(options)) for options in OPTIONS))
    best = min(d for ms, d in map(total, every) if ms <= budget_ms + 1e-9)
    latency_ms, distortion = total(by_milp(OPTIONS, budget_ms))
    assert latency_ms <= budget_ms + 1e-6
    assert distortion == pytest.approx(best)


@pytest.mark.parametrize("budget_ms", [3.0, 2.0, 1.3, 0.9])
def test_one_slope_for_all_layers_fits_the_budget_and_never_beats_milp(budget_ms: float) -> None:
    latency_ms, distortion = total(by_slope(OPTIONS, budget_ms))
    assert latency_ms <= budget_ms + 1e-9
    assert distortion >= total(by_milp(OPTIONS, budget_ms))[1] - 1e-9


def test_uniform_takes_the_lowest_sparsity_that_fits_or_says_that_none_does() -> None:
    options = (layer((0.8, 0.1), (0.5, 0.9)), layer((0.9, 0.3), (0.6, 0.5)))
    assert by_uniform(options, 1.2) == (2, 2)
    assert by_uniform(options, 2.0) == (0, 0)
    with pytest.raises(BudgetNotMetError, match="no uniform sparsity"):
        by_uniform(options, 0.5)


def test_uniform_stays_dense_where_no_pattern_gains_and_dense_fits() -> None:
    options = (layer(), layer())
    assert by_uniform(options, 2.0) == (0, 0)
    with pytest.raises(BudgetNotMetError, match="no uniform sparsity"):
        by_uniform(options, 1.9)


def test_latency_between_measured_points_never_rises_with_sparsity() -> None:
    gemms = [
        GemmCost(
            tokens=1,
            in_features=1,
            out_features=1,
            activation="none",
            pattern="64x1",
            sparsity=sparsity,
            latency_ms=ms,
            spread_ms=0.0,
            stable=True,
        )
        for sparsity, ms in ((0.4, 0.5), (0.2, 0.8), (0.6, 0.55), (0.8, 0.1))
    ]
    latency_at = interpolated_latency(gemms)
    assert latency_at(0.2) == pytest.approx(0.8)
    assert latency_at(0.3) == pytest.approx((0.8 + 0.525) / 2)
    assert latency_at(0.4) == latency_at(0.6) == pytest.approx(0.525)  # 0.5 and 0.55 as one
    assert latency_at(0.8) == pytest.approx(0.1)
    assert latency_at(0.1) == float("inf")  # below what was measured nothing is promised


@pytest.mark.parametrize(
    ("text", "ms"), [("0.5x", 10.0), ("12ms", 12.0), (".25x", 5.0), ("0.012s", 12.0)]
)
def test_a_budget_is_a_share_or_a_time(text: str, ms: float) -> None:
    assert latency_budget_ms(text, dense_ms=20.0) == pytest.approx(ms)


@pytest.mark.parametrize("text", ["", "fast", "0x", "-1ms", "5", "1e3ms", "nanx"])
def test_a_budget_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UnknownOptionError, match="no latency budget"):
        latency_budget_ms(text, dense_ms=20.0)
