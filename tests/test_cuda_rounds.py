"""How the GPU benchmarks take turns and what they make of the rounds: no GPU, no torch, no time."""

from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.gpu_rounds import (
    WRONG,
    DeviceLostError,
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
            raise RuntimeError("out of memory")
        return 1.0

    found = in_turns({"bad": bad, "good": good}, rounds=6)
    assert found == {"bad": "RuntimeError: out of memory", "good": (5.0,) * 6}
    assert calls == {"bad": 4, "good": 12}


@pytest.mark.parametrize("where", ["entering", "in a round", "at the last comparison"])
def test_a_contestant_that_takes_the_device_along_is_named_and_no_other_is_blamed(
    where: str,
) -> None:
    """CUDA answers every call after an illegal address with that error."""
    lost = False

    def call(*, at: str = "") -> None:
        nonlocal lost
        lost = lost or at == where
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    def bad_sample() -> float:
        call(at="in a round")
        return 1.0

    def good_sample() -> float:
        call()
        return 1.0

    measured: list[float] = []

    def bad_error() -> float:
        measured.append(0.0)
        call(at=("entering", "at the last comparison")[len(measured) - 1])
        return 0.0

    def run() -> None:
        entries = {
            name: entered(name, partial(entry, sample, error=error), tolerance=1e-3, probe=call)
            for name, sample, error in (
                ("bad", bad_sample, bad_error), ("good", good_sample, right)
            )
        }  # fmt: skip
        race(entries, rounds=2, tolerance=1e-3, probe=call)

    with pytest.raises(DeviceLostError, match=r"lost at bad \(RuntimeError: an illegal memory"):
        run()


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
        "2:4": entered("2:4", refuse, tolerance=1e-3),
        "dense": entered("dense", lambda: entry(lambda: 3.0), tolerance=1e-3),
    }
    found = race(entries, rounds=4, tolerance=1e-3)
    assert found["2:4"].samples == ()
    assert found["2:4"].reason == ("RuntimeError: operation not permitted when stream is capturing")
    assert (found["dense"].samples, found["dense"].reason) == ((3.0,) * 4, None)


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_a_wrong_first_result_is_never_measured(error: float) -> None:
    def never() -> float:
        raise AssertionError("it was measured")

    refused = entered("A", lambda: entry(never, error=lambda: error), tolerance=1e-3)
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
        "A",
        lambda: entry(sample, error=lambda: 0.5 if len(measured) > 4 else 0.0),
        tolerance=1e-3,
    )
    found = race({"A": prepared}, rounds=3, tolerance=1e-3)["A"]
    assert (found.samples, found.error, found.reason) == ((), 0.5, WRONG)


def test_a_refusal_without_a_text_is_reported_by_its_name() -> None:
    assert reason_of(AssertionError()) == "AssertionError"


def test_an_error_while_another_is_handled_does_not_hide_the_first() -> None:
    """torch ends a capture that failed, which fails too."""

    def capture() -> None:
        try:
            raise RuntimeError("cuSPARSELt: not supported")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as refused:
        capture()
    assert reason_of(refused.value) == (
        "RuntimeError: cuSPARSELt: not supported; then RuntimeError: operation failed due to "
        "a previous error during capture"
    )


def test_the_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert spread([]) is None


def test_a_gain_is_taken_round_by_round() -> None:
    """Both contestants are four times slower in one round; their quotient is not."""
    peer, own = [10.0, 40.0, 12.0], [5.0, 20.0, 4.0]
    assert gain(peer, own) == Spread(median=2.0, low=2.0, high=2.5)
    assert gain([], own) is None
    assert gain(peer, []) is None
