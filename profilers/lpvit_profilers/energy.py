"""Energy of one call: a steady loop between two rests, several times over.

    idle | warm up |  loop   |  loop   | ... |  loop   | idle
                   ^counter  ^step
                    gross = energy of a loop / its calls
                    net   = gross - idle power * time of a call

No sensor at hand (1 ms to 1 s, 10 to 50 readings a second) can see a single call of a few
milliseconds, so calls are never measured alone.
"""

import random
import time
from collections.abc import Callable, Mapping

from lpvit_profilers.base import PowerSource, ProbesAveraging
from lpvit_profilers.energy_records import EnergyMeasurement
from lpvit_profilers.energy_summary import Session, Turn, summarise
from lpvit_profilers.energy_window import measure_window
from lpvit_profilers.sampler import Sampler

# Seconds of one loop.
QUICK_S, DEFAULT_S, REFERENCE_S = 3.0, 10.0, 60.0
REPEATS = 5
# How often heat, clocks and throttling are noted while the work runs.
_WATCH_S = 1.0
_AGREE = 0.01
_PROBE_S = 3.0  # to see a mean over one second follow a step
_SAME_TEMPERATURE_C = 2.0
_Run = Callable[[], object]


def measure_energy(
    run: _Run,
    source: PowerSource,
    *,
    window_s: float = DEFAULT_S,
    repeats: int = REPEATS,
    idle_s: float | None = None,
    max_warmup_s: float | None = None,
    max_cooldown_s: float = 10.0,
    seed: int | None = None,
) -> EnergyMeasurement:
    """Measure the energy of `run()` with an open `source`; nothing else may run on the device.

    `run` must be synchronous. `idle_s` is the length of the rest before and after, by default
    half a window; whatever is loaded stays loaded, so a loaded engine belongs to idle.
    `max_warmup_s` is by default six windows, at most 60 s. Returns None for every energy, with
    the reasons, where the source cannot tell; raises MeasurementError when the sampler fails.
    """
    return measure_energies(
        {"run": run},
        source,
        window_s=window_s,
        repeats=repeats,
        idle_s=idle_s,
        max_warmup_s=max_warmup_s,
        max_cooldown_s=max_cooldown_s,
        seed=seed,
    )["run"]


def measure_energies(
    runs: Mapping[str, _Run],
    source: PowerSource,
    *,
    window_s: float = DEFAULT_S,
    repeats: int = REPEATS,
    idle_s: float | None = None,
    max_warmup_s: float | None = None,
    max_cooldown_s: float = 10.0,
    seed: int | None = None,
) -> dict[str, EnergyMeasurement]:
    """The same for several, to be compared: their repeats take turns, so that drift meets all.

    The order is reversed from one repeat to the next.
    """
    if not window_s > 0 or repeats < 1:
        raise ValueError(f"window_s is {window_s} and repeats {repeats}; both must be above 0")
    rest_s = window_s / 2 if idle_s is None else idle_s
    warm_limit_s = min(60.0, 6 * window_s) if max_warmup_s is None else max_warmup_s
    generator = random.Random(seed)
    averaging_unknown = _probed(source, next(iter(runs.values())), min(_PROBE_S, window_s))
    with Sampler(source, seed=seed, watch_s=min(_WATCH_S, window_s / 3)) as sampler:
        time.sleep(2 * sampler.poll_s + 2 * source.info.period_s + source.info.averaging_s)
        start = source.conditions()
        idle_before = measure_window(_rest, sampler, source.info, for_s=rest_s)
        block_s = min(1.0, window_s / 3)
        unsettled = {
            name: _warm_up(run, source, block_s=block_s, limit_s=warm_limit_s)
            for name, run in runs.items()
        }
        warm_c = source.conditions().temperature_c
        turns: dict[str, list[Turn]] = {name: [] for name in runs}
        for repeat in range(repeats):
            for name in list(runs) if repeat % 2 == 0 else reversed(list(runs)):
                _cool_down(source, warm_c, max_cooldown_s)
                # A new phase between the work and the sensor for every repeat.
                time.sleep(generator.uniform(0.0, 0.1))
                turns[name].append(_turn(runs[name], source, sampler, window_s))
        idle_after = measure_window(_rest, sampler, source.info, for_s=rest_s)
        end, was_suspect = source.conditions(), sampler.was_suspect
    return {
        name: summarise(
            Session(
                info=source.info,
                window_s=window_s,
                start=start,
                end=end,
                idle_before=idle_before,
                idle_after=idle_after,
                turns=tuple(turns[name]),
                averaging_unknown=averaging_unknown,
                unsettled=unsettled[name],
                was_suspect=was_suspect,
            )
        )
        for name in runs
    }


def _probed(source: PowerSource, run: _Run, for_s: float) -> str | None:
    """Let the source find how far back it looks, while it is idle and nobody else reads it."""
    if not isinstance(source, ProbesAveraging):
        return None
    return source.probe_averaging(run, for_s=for_s).reason


def _turn(run: _Run, source: PowerSource, sampler: Sampler, window_s: float) -> Turn:
    before = source.conditions()
    window = measure_window(run, sampler, source.info, for_s=window_s)
    during = sampler.conditions(begin_ns=window.begin_ns, end_ns=window.end_ns)
    return Turn(window=window, before=before, during=during, after=source.conditions())


def _rest() -> None:
    time.sleep(0.01)


def _warm_up(run: _Run, source: PowerSource, *, block_s: float, limit_s: float) -> str | None:
    """Work until three blocks agree within 1 % and 1 C, or say that they did not."""
    begin_s, blocks = time.monotonic(), []
    while time.monotonic() - begin_s < limit_s:
        blocks.append((_time_of_call(run, block_s), source.conditions().temperature_c))
        times = [call_s for call_s, _ in blocks[-3:]]
        known_c = [t for _, t in blocks[-3:] if t is not None]
        warm = not known_c or max(known_c) - min(known_c) < 1.0
        if len(times) == 3 and max(times) - min(times) <= _AGREE * min(times) and warm:
            return None
    return (
        f"latency and temperature did not settle in {limit_s:.0f} s of warm-up; stop other "
        "programs, or fix the clocks"
    )


def _time_of_call(run: _Run, for_s: float) -> float:
    begin_ns, calls = time.monotonic_ns(), 0
    while (elapsed_ns := time.monotonic_ns() - begin_ns) < for_s * 1e9:
        run()
        calls += 1
    return elapsed_ns / 1e9 / max(calls, 1)


def _cool_down(source: PowerSource, to_c: float | None, limit_s: float) -> None:
    """Wait until the device is back at the temperature of the first repeat."""
    begin_s = time.monotonic()
    while to_c is not None and time.monotonic() - begin_s < limit_s:
        now_c = source.conditions().temperature_c
        if now_c is None or now_c <= to_c + _SAME_TEMPERATURE_C:
            return
        time.sleep(0.2)
