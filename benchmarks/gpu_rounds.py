"""Contestants measured in turns, and what their rounds say. Nothing here knows of a GPU.

    round 1   A B C D        every turn: an untimed opening, then the measured one
    round 2   D C B A
    round 3   A B C D

A drift of clocks, heat or other users of the machine then touches all contestants alike, and the
quotient of two of them is taken round by round.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from lpvit_edge.errors import LpvitEdgeError, MeasurementError

Sample = Callable[[], float]  # measures once: microseconds, or millijoules
Probe = Callable[[], object]  # raises what a library raises where the device is lost
ROUNDS = 21
WRONG = "the result is wrong"


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The median of some rounds, and their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contestant ready for its rounds. error says how far the result of the latest sample is from
    float32, over the largest value."""

    sample: Sample
    error: Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A contestant that takes no part, and why."""

    reason: str
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a contestant measured in every round; none where reason says why not."""

    samples: tuple[float, ...]
    error: float | None
    reason: str | None


class DeviceLostError(Exception):
    """No contestant can be measured any more. It is none of refusals(), which would blame the next
    contestant, and the one after it."""


def nothing() -> None:
    """The probe of a machine without a device that could be lost."""


def refusals() -> tuple[type[Exception], ...]:
    """What libraries raise when they refuse a layer; the table says so, and goes on."""
    known = (RuntimeError, ValueError, AssertionError, LpvitEdgeError)
    try:
        from triton.errors import TritonError
    except ImportError:  # torch for CPUs comes without triton
        return known
    return (*known, TritonError)


def reason_of(refused: BaseException) -> str:
    """An error as one line; an assert has no text at all. What a library raises while it handles
    another error, as torch does where a capture breaks off, stands behind that first error."""
    text = next(iter(str(refused).splitlines()), "")
    found = f"{type(refused).__name__}: {text}" if text else type(refused).__name__
    first: BaseException = refused
    while not isinstance(first, LpvitEdgeError) and first.__context__ is not None:
        first = first.__context__
    return found if first is refused else f"{reason_of(first)}; then {found}"


def excuse(name: str, refused: Exception, probe: Probe) -> str:
    """Why a contestant takes no part. Raises DeviceLostError where the device did not survive it,
    so that no one else is blamed."""
    reason = reason_of(refused)
    try:
        probe()
    except refusals() as lost:
        raise DeviceLostError(
            f"the device was lost at {name} ({reason}), and now answers {reason_of(lost)}"
        ) from refused
    return reason


def entered(
    name: str,
    prepare: Callable[[], Entry | Refused],
    *,
    tolerance: float,
    probe: Probe = nothing,
) -> Entry | Refused:
    """Prepare a contestant; one that fails, or whose first result is wrong, is refused."""
    try:
        entry = prepare()
        if isinstance(entry, Refused):
            return entry
        error = entry.error()
    except refusals() as refused:
        return Refused(reason=excuse(name, refused, probe))
    return entry if error <= tolerance else Refused(reason=WRONG, error=error)


def race(
    entries: Mapping[str, Entry | Refused],
    *,
    rounds: int,
    tolerance: float,
    openings: int = 1,
    probe: Probe = nothing,
) -> dict[str, Result]:
    """Measure all entries in turns. One whose last measured result is wrong loses its samples."""
    samples = {name: e.sample for name, e in entries.items() if isinstance(e, Entry)}
    measured = in_turns(samples, rounds=rounds, openings=openings, probe=probe)
    return {
        name: Result(samples=(), error=entry.error, reason=entry.reason)
        if isinstance(entry, Refused)
        else _result(name, entry, measured[name], tolerance=tolerance, probe=probe)
        for name, entry in entries.items()
    }


def _result(
    name: str, entry: Entry, measured: tuple[float, ...] | str, *, tolerance: float, probe: Probe
) -> Result:
    if isinstance(measured, str):
        return Result(samples=(), error=None, reason=measured)
    try:
        error = entry.error()
    except refusals() as refused:
        return Result(samples=(), error=None, reason=excuse(name, refused, probe))
    if not error <= tolerance:
        return Result(samples=(), error=error, reason=WRONG)
    return Result(samples=measured, error=error, reason=None)


def in_turns(
    samples: Mapping[str, Sample], *, rounds: int, openings: int = 1, probe: Probe = nothing
) -> dict[str, tuple[float, ...] | str]:
    """The samples of every contestant, one a round, or why there are none.

    The order is reversed every other round. Every turn opens with calls that do not count, because
    the other contestants have just emptied the caches. One that fails drops out, with the rounds it
    had; the others go on, unless it took the device along: then DeviceLostError. Raises ValueError
    for fewer than two rounds, which have no spread.
    """
    if rounds < 2:
        raise ValueError(f"rounds is {rounds}; a spread needs at least 2")
    found: dict[str, list[float]] = {name: [] for name in samples}
    reasons: dict[str, str] = {}
    for turn in range(rounds):
        running = [name for name in samples if name not in reasons]
        for name in running if turn % 2 == 0 else running[::-1]:
            try:
                for _ in range(openings):
                    samples[name]()
                found[name].append(_positive(samples[name]()))
            except refusals() as refused:
                reasons[name] = excuse(name, refused, probe)
    return {name: reasons.get(name, tuple(found[name])) for name in samples}


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise MeasurementError(f"a sample of {value} is no measurement; check the clock")
    return value


def spread(samples: Sequence[float]) -> Spread | None:
    """Median and quartiles of at least two samples; None of none."""
    if not samples:
        return None
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high)


def gain(peer: Sequence[float], own: Sequence[float]) -> Spread | None:
    """How many times less `own` takes than `peer`: quotients round by round, then their spread."""
    if not peer or not own:
        return None
    return spread([theirs / ours for theirs, ours in zip(peer, own, strict=True)])
