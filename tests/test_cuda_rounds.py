"""How the GPU benchmarks take turns and what they make of the rounds: no GPU, no torch, no time."""

from collections.abc import Callable

import pytest

from benchmarks.gpu_goals import kernel_goals, model_goals
from benchmarks.gpu_records import KernelRow, ModelRow
from benchmarks.gpu_rounds import (
    WRONG,
    Entry,
    Refused,
    Spread,
    entered,
    gain,
    in_turns,
    race,
    reason_of,
    spread,
)
from benchmarks.gpu_tables import KERNEL_HEAD, goal_line, kernel_line, model_lines


def right() -> float:
    return 1e-4


def entry(sample: Callable[[], float], *, error: Callable[[], float] = right) -> Entry:
    return Entry(sample=sample, error=error)


def test_the_order_is_reversed_every_other_round_and_every_turn_opens_untimed() -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    found = in_turns({name: noted(name) for name in "ABC"}, rounds=3)
    assert "".join(calls) == "AABBCC" + "CCBBAA" + "AABBCC"
    # The second call of a turn counts, numbered over the whole run.
    assert found == {"A": (2.0, 12.0, 14.0), "B": (4.0, 10.0, 16.0), "C": (6.0, 8.0, 18.0)}


def test_a_drift_of_the_machine_touches_all_contestants_alike() -> None:
    """A clock that slows down steadily: measured one after the other, the second of two equal
    contestants would seem a third slower; in turns the gain is 1."""
    now = 0

    def slowing() -> float:
        nonlocal now
        now += 1
        return 100.0 + now

    found = in_turns({"A": slowing, "B": slowing}, rounds=20)
    a, b = found["A"], found["B"]
    assert isinstance(a, tuple)
    assert isinstance(b, tuple)
    between = gain(a, b)
    assert between is not None
    assert between.median == pytest.approx(1.0, abs=0.002)


def test_a_contestant_that_fails_in_a_round_drops_out_with_its_rounds_and_the_others_go_on() -> (
    None
):
    calls = {"good": 0, "bad": 0}

    def good() -> float:
        calls["good"] += 1
        return 5.0

    def bad() -> float:
        calls["bad"] += 1
        if calls["bad"] == 4:
            raise RuntimeError("misaligned address")
        return 1.0

    found = in_turns({"bad": bad, "good": good}, rounds=6)
    assert found == {"bad": "RuntimeError: misaligned address", "good": (5.0,) * 6}
    assert calls == {"bad": 4, "good": 12}


@pytest.mark.parametrize("nonsense", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sample_that_is_no_time_is_a_reason_and_not_a_time(nonsense: float) -> None:
    found = in_turns({"A": lambda: nonsense, "B": lambda: 2.0}, rounds=2)
    assert "is no measurement" in found["A"]
    assert found["B"] == (2.0, 2.0)


def test_an_error_of_our_own_is_not_taken_for_a_refusal() -> None:
    def mistake() -> float:
        raise TypeError("a mistake in the benchmark")

    with pytest.raises(TypeError):
        in_turns({"A": mistake}, rounds=2)


def test_a_single_round_has_no_spread_and_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        in_turns({"A": lambda: 1.0}, rounds=1)


def test_a_contestant_that_cannot_be_captured_has_its_reason_and_the_others_their_rounds() -> None:
    def refuse() -> Entry:
        raise RuntimeError("operation not permitted when stream is capturing\nand a page")

    entries = {
        "2:4": entered(refuse, tolerance=1e-3),
        "dense": entered(lambda: entry(lambda: 3.0), tolerance=1e-3),
    }
    found = race(entries, rounds=4, tolerance=1e-3)
    assert found["2:4"].samples == ()
    assert found["2:4"].reason == ("RuntimeError: operation not permitted when stream is capturing")
    assert (found["dense"].samples, found["dense"].reason) == ((3.0,) * 4, None)


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_a_wrong_first_result_is_never_measured(error: float) -> None:
    def never() -> float:
        raise AssertionError("it was measured")

    refused = entered(lambda: entry(never, error=lambda: error), tolerance=1e-3)
    assert isinstance(refused, Refused)
    found = race({"A": refused}, rounds=3, tolerance=1e-3)["A"]
    assert (found.samples, found.reason) == ((), WRONG)
    assert found.error == pytest.approx(error, nan_ok=True)


def test_a_result_that_turns_wrong_during_the_rounds_costs_its_samples() -> None:
    """A race between launches, say, that the first comparison did not see."""
    measured: list[float] = []

    def sample() -> float:
        measured.append(1.0)
        return 1.0

    prepared = entered(
        lambda: entry(sample, error=lambda: 0.5 if len(measured) > 4 else 0.0), tolerance=1e-3
    )
    found = race({"A": prepared}, rounds=3, tolerance=1e-3)["A"]
    assert (found.samples, found.error, found.reason) == ((), 0.5, WRONG)


def test_a_refusal_without_a_text_is_reported_by_its_name() -> None:
    assert reason_of(AssertionError()) == "AssertionError"


def test_the_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert spread([]) is None


def test_a_gain_is_taken_round_by_round() -> None:
    """Both contestants are four times slower in one round; their quotient is not."""
    peer, own = [10.0, 40.0, 12.0], [5.0, 20.0, 4.0]
    assert gain(peer, own) == Spread(median=2.0, low=2.0, high=2.5)
    assert gain([], own) is None
    assert gain(peer, []) is None


def row(kernel: str = "ours 64x64 d=0.5", **changes: object) -> KernelRow:
    given: dict[str, object] = {
        "layer": "B fc1", "batch": 8, "kernel": kernel, "density": 0.5,
        "time_us": Spread(median=41.23, low=40.91, high=41.8),
        "over_dense": Spread(median=1.43, low=1.4, high=1.45),
        "over_bsr": Spread(median=2.0, low=1.9, high=2.1), "bsr_peer": "torch bsr 64x64 d=0.5",
        "floor_us": 30.0, "error": 3e-4, "copies": 7, "rounds_us": (1.0, 2.0), "reason": None,
    }  # fmt: skip
    return KernelRow(**(given | changes))  # type: ignore[arg-type]


def test_a_line_shows_time_and_gains_with_quartiles_the_floor_and_the_error_in_100_columns() -> (
    None
):
    text = kernel_line(row())
    for part in ("41.2 (40.9-41.8)", "1.43 (1.40-1.45)", "2.00 (1.90-2.10)", "30.0  73%", "3e-04"):
        assert part in text
    assert max(len(text), len(KERNEL_HEAD)) <= 100


def test_a_line_without_a_time_says_why() -> None:
    text = kernel_line(row(time_us=None, over_dense=None, reason="RuntimeError: not here"))
    assert text.endswith("-- RuntimeError: not here")


def test_a_line_without_a_peer_says_so_and_keeps_its_time() -> None:
    text = kernel_line(row(over_bsr=None))
    assert "41.2 (40.9-41.8)" in text
    assert " -- " in text


def wide(
    gain: float, *, low: float | None = None, kernel: str, layer: str, batch: int
) -> KernelRow:
    found = Spread(median=gain, low=gain if low is None else low, high=gain)
    return row(kernel, layer=layer, batch=batch, over_dense=found)


def half_rows(gains: dict[str, float]) -> list[KernelRow]:
    return [wide(gains[layer], kernel="ours 64x64 d=0.5", layer=layer, batch=8) for layer in gains]


def test_a_goal_over_layers_is_decided_by_the_layer_that_gains_least() -> None:
    gains = {"B qkv": 1.6, "B fc1": 1.2, "B fc2": 1.5, "B proj": 0.5}
    goal = kernel_goals(half_rows(gains))[0]
    assert (goal.verdict, goal.where) == ("missed", "B fc1 batch 8 ours 64x64 d=0.5")
    assert kernel_goals(half_rows(gains | {"B fc1": 1.3}))[0].verdict == "met"


def test_the_better_of_the_two_wide_blocks_counts_on_every_layer() -> None:
    rows = half_rows({"B fc1": 1.2})
    rows.append(wide(1.4, kernel="ours 64x32 d=0.5", layer="B fc1", batch=8))
    goal = kernel_goals(rows)[0]
    assert (goal.verdict, goal.where) == ("met", "B fc1 batch 8 ours 64x32 d=0.5")
    assert "1.40 (1.40-1.40) at B fc1 batch 8" in goal_line(goal)


def test_batch_1_and_narrow_blocks_decide_no_goal() -> None:
    rows = half_rows({"B fc1": 1.4})
    rows.append(wide(0.3, kernel="ours 64x64 d=0.5", layer="B fc1", batch=1))
    rows.append(wide(9.0, kernel="ours 16x16 d=0.5", layer="B fc1", batch=8))
    found = kernel_goals(rows)[0].found
    assert found is not None
    assert found.median == 1.4


def test_a_goal_that_only_the_median_meets_says_so() -> None:
    rows = [wide(1.31, low=1.2, kernel="ours 64x64 d=0.5", layer="B fc1", batch=8)]
    assert kernel_goals(rows)[0].verdict == "met by the median, not by the lower quartile"


def test_a_goal_with_a_layer_that_was_not_measured_is_not_met() -> None:
    rows = half_rows({"B fc1": 1.4})
    rows.append(row(layer="B fc2", over_dense=None, time_us=None, reason="no"))
    goal = kernel_goals(rows)[0]
    assert (goal.verdict, goal.found) == ("not measured", None)
    assert "B fc2" in str(goal.where)
    assert kernel_goals([])[0].verdict == "not measured"


def model_row(**changes: object) -> ModelRow:
    given: dict[str, object] = {
        "model": "ours 64x64 d=0.3", "batch": 32,
        "latency_ms": Spread(median=9.123, low=9.1, high=9.2),
        "over_dense": Spread(median=1.8, low=1.7, high=1.9), "floor_ms": 3.0,
        "energy_mj_per_image": Spread(median=61.5, low=60.0, high=62.0),
        "energy_over_dense": Spread(median=1.3, low=1.2, high=1.4), "error": 1e-3,
        "rounds_ms": (9.0, 9.2), "rounds_mj_per_image": (61.0, 62.0), "reason": None,
        "energy_reason": None,
    }  # fmt: skip
    return ModelRow(**(given | changes))  # type: ignore[arg-type]


def test_a_models_lines_show_time_energy_and_both_gains_with_their_spread() -> None:
    text = model_lines(model_row())
    for part in ("9.123 (9.100-9.200) ms", "1.80 (1.70-1.90)", "3.000  33%", "1e-03",
                 "61.5 (60.0-62.0) mJ", "1.30 (1.20-1.40)"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_model_without_energy_keeps_its_time_and_says_why() -> None:
    text = model_lines(model_row(energy_mj_per_image=None, energy_reason="no counter"))
    assert "9.123 (9.100-9.200) ms" in text
    assert "-- no counter" in text
    assert "-- no GPU" in model_lines(model_row(latency_ms=None, reason="no GPU"))


def test_a_whole_model_only_reaches_a_goal_subject_to_its_accuracy() -> None:
    time, energy = model_goals([model_row(), model_row(model="2:4 cuSPARSELt", over_dense=None)])
    assert time.verdict == "reached, if accuracy holds there"
    assert time.where == "ours 64x64 d=0.3 batch 32"
    assert energy.verdict == "missed"
    assert model_goals([])[0].verdict == "not measured"
