"""Latency of a callable, with its raw samples and a verdict on whether to believe them.

    warm up            calibrate             measure
    [blk][blk][blk] -> calls per sample  ->  [s][s][s][s] ... until min_time_s has passed
    until two successive blocks agree

A sample is the mean of `calls_per_sample` calls; that is 1 unless one call is so short that
reading the clock would count. The model for the taste is pyperf: raw samples are the result,
statistics are derived, and the tool says why it distrusts itself.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.errors import MeasurementError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Clock = Callable[[], int]
Run = Callable[[], object]

# Two successive warm-up blocks agree when their medians differ by no more than this.
WARM_AGREEMENT = 0.05
# The clock costs about 0.1 us a reading; a sample of 0.1 ms keeps that near one thousandth.
MIN_SAMPLE_NS = 100_000
MIN_SAMPLES = 10
MAX_SAMPLES = 200_000  # 1.6 MB of samples for each run, however long the measurement
ROUNDS = 10
_MAX_CALLS = 1 << 24


class LatencyMeasurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Raw samples of one callable, in the order they were taken, and what they say.

    `reasons` each complete the sentence "may be unstable because ..."; `stable` means there are
    none. `mad_ms` is the median absolute deviation, not scaled to a standard deviation.
    """

    samples_ms: tuple[float, ...]
    calls_per_sample: int
    warmup_s: float
    median_ms: float
    p90_ms: float
    p99_ms: float
    mad_ms: float
    stable: bool
    reasons: tuple[str, ...]

    @property
    def mean_ms(self) -> float:
        return float(np.mean(self.samples_ms))


class _Warm(msgspec.Struct, frozen=True, kw_only=True):
    calls: int
    duration_s: float
    reason: str | None


def measure_latency(
    run: Run,
    *,
    min_time_s: float = 1.0,
    min_samples: int = MIN_SAMPLES,
    max_warmup_s: float | None = None,
    clock: Clock = time.perf_counter_ns,
) -> LatencyMeasurement:
    """Time `run()` until at least `min_time_s` and `min_samples` have passed.

    `max_warmup_s` bounds the warm-up; by default the larger of 1 s and `min_time_s`. Anything
    that works asynchronously must synchronise inside `run`. Raises MeasurementError when the
    clock does not advance.
    """
    _check(min_time_s, min_samples)
    limit_s = max(1.0, min_time_s) if max_warmup_s is None else max_warmup_s
    warm = _warm_up(run, block_s=min_time_s / 10, limit_s=limit_s, clock=clock)
    samples = _timed_block(
        run, calls=warm.calls, for_s=min_time_s, at_least=min_samples, clock=clock
    )
    return _summarise(samples, warm)


def measure_alternating(
    runs: Mapping[str, Run],
    *,
    min_time_s: float = 1.0,
    min_samples: int = MIN_SAMPLES,
    rounds: int = ROUNDS,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, LatencyMeasurement]:
    """Time several callables in turns (A B A B ...), so that drift touches all of them alike.

    Each gets at least `min_time_s` in `rounds` blocks. A block opens with one call that is not
    timed, because the other callables have just emptied the caches; the order is reversed every
    other round, so that a steady drift cancels.
    """
    _check(min_time_s, min_samples)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    limit_s = max(1.0, min_time_s)
    warm = {
        name: _warm_up(run, block_s=min_time_s / 10, limit_s=limit_s, clock=clock)
        for name, run in runs.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else names[::-1]:
            runs[name]()
            samples[name] += _timed_block(
                runs[name],
                calls=warm[name].calls,
                for_s=min_time_s / rounds,
                at_least=-(-min_samples // rounds),
                clock=clock,
            )
    return {name: _summarise(samples[name], warm[name]) for name in runs}


def _check(min_time_s: float, min_samples: int) -> None:
    if not min_time_s > 0:
        raise ValueError(f"min_time_s is {min_time_s}; it must be above 0")
    if min_samples < 1:
        raise ValueError(f"min_samples is {min_samples}; it must be at least 1")


def _warm_up(run: Run, *, block_s: float, limit_s: float, clock: Clock) -> _Warm:
    """Run blocks until two successive ones agree, or the limit has passed."""
    run()  # the first call compiles, allocates and faults pages in; it belongs to no block
    calls = _calibrate(run, clock=clock)
    begin = clock()
    previous, latest = float("nan"), float("nan")
    while (clock() - begin) / 1e9 < limit_s:
        block = _timed_block(run, calls=calls, for_s=block_s, at_least=5, clock=clock)
        previous, latest = latest, float(np.median(block))
        if abs(latest - previous) <= WARM_AGREEMENT * previous:
            return _Warm(calls=calls, duration_s=(clock() - begin) / 1e9, reason=None)
    duration_s = (clock() - begin) / 1e9
    reason = (
        f"the warm-up did not settle in {duration_s:.3g} s "
        f"(the last two blocks: {previous:.4g} and {latest:.4g} ms)"
    )
    return _Warm(calls=calls, duration_s=duration_s, reason=reason)


def _calibrate(run: Run, *, clock: Clock) -> int:
    """Calls per sample: 1, doubled until one sample is long against the clock."""
    calls = 1
    while calls <= _MAX_CALLS:
        if _time_calls(run, calls, clock) >= MIN_SAMPLE_NS:
            return calls
        calls *= 2
    raise MeasurementError(
        f"{_MAX_CALLS} calls took less than {MIN_SAMPLE_NS} ns on this clock; check that the "
        "clock advances and that the callable does something"
    )


def _time_calls(run: Run, calls: int, clock: Clock) -> int:
    begin = clock()
    for _ in range(calls):
        run()
    return clock() - begin


def _timed_block(run: Run, *, calls: int, for_s: float, at_least: int, clock: Clock) -> list[float]:
    """Samples in ms per call, until `for_s` has passed and there are `at_least` of them."""
    samples: list[float] = []
    total_ns, wanted_ns = 0, for_s * 1e9
    while (total_ns < wanted_ns or len(samples) < at_least) and len(samples) < MAX_SAMPLES:
        elapsed_ns = _time_calls(run, calls, clock)
        if elapsed_ns <= 0:
            raise MeasurementError(
                f"the clock moved by {elapsed_ns} ns during {calls} calls; measure again, with a "
                "monotonic clock"
            )
        samples.append(elapsed_ns / calls / 1e6)
        total_ns += elapsed_ns
    return samples


def _summarise(samples: list[float], warm: _Warm) -> LatencyMeasurement:
    values = np.asarray(samples)
    median, p90, p99 = (float(v) for v in np.percentile(values, (50, 90, 99)))
    mad = float(np.median(np.abs(values - median)))
    doubts = _doubts(values, median_ms=median, p99_ms=p99, mad_ms=mad)
    reasons = doubts if warm.reason is None else (warm.reason, *doubts)
    return LatencyMeasurement(
        samples_ms=tuple(samples),
        calls_per_sample=warm.calls,
        warmup_s=warm.duration_s,
        median_ms=median,
        p90_ms=p90,
        p99_ms=p99,
        mad_ms=mad,
        stable=not reasons,
        reasons=reasons,
    )


def _doubts(
    values: "NDArray[np.float64]", *, median_ms: float, p99_ms: float, mad_ms: float
) -> tuple[str, ...]:
    """Why these samples (n,) in ms may not be repeatable. Limits are this project's own."""
    doubts = []
    if len(values) < MIN_SAMPLES:
        doubts.append(f"there are only {len(values)} samples; measure for longer")
    if mad_ms > 0.05 * median_ms:
        doubts.append(
            f"half of the samples lie more than {mad_ms / median_ms:.0%} from the median; "
            "stop other programs"
        )
    if p99_ms > 1.5 * median_ms:
        doubts.append(
            f"the slowest of a hundred takes {p99_ms / median_ms:.1f} times the median; something "
            "interrupts the run"
        )
    early, late = _median_of_halves(values)
    if abs(late - early) > 0.05 * median_ms:
        doubts.append(
            f"the second half ran at {late:.4g} ms and the first at {early:.4g} ms; the clocks or "
            "the load changed"
        )
    return tuple(doubts)


def _median_of_halves(values: "NDArray[np.float64]") -> tuple[float, float]:
    if len(values) < 2:
        return float(values[0]), float(values[0])
    early, late = np.array_split(values, 2)
    return float(np.median(early)), float(np.median(late))
