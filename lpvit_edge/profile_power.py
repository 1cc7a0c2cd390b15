"""The power sensor of a device profile: which one, and what to say of the energies it gave."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge.energy import working_part
from lpvit_edge.progress import say
from lpvit_edge.records import GemmCost, PowerNote

if TYPE_CHECKING:
    from lpvit_profilers.base import SourceInfo
    from lpvit_profilers.sampler import Sampler

_WATCH_S = 1.0  # how often throttling is looked for
_NO_ESTIMATE = "the estimate from --tdp-w is of a processor, and the work is on the GPU; "
_CONTRADICT = "some readings contradict each other (a rail above its own total)"


@contextmanager
def sensor_of(
    engine: str,
    tdp_w: float | None,
) -> "Iterator[tuple[tuple[Sampler, SourceInfo] | None, PowerNote]]":
    """The best sensor that covers where `engine` works, sampling, or None; and what to say of it.

    Only without a sensor, and only with a stated TDP, a model takes its place; its energies are
    marked "estimated". The model is of a processor and takes no place where the GPU works.
    """
    from lpvit_profilers.base import opened
    from lpvit_profilers.detect import default_source, detect, no_sensor, why_none
    from lpvit_profilers.estimate import EstimatedSource
    from lpvit_profilers.sampler import Sampler

    working = working_part(engine)
    source = default_source(working=working)
    if source is not None and tdp_w is not None:
        say("a sensor measures here: --tdp-w is not used")
    if source is None and tdp_w is not None and working != "gpu":
        source = EstimatedSource(tdp_w=tdp_w)
    if source is None:
        reason = (
            f"{no_sensor(working)} ({why_none(detect(), working=working)}); "
            f"{_NO_ESTIMATE if tdp_w is not None else ''}the profile carries latency only"
        )
        yield None, PowerNote(source=None, scope=None, quality="unavailable", reason=reason)
        return
    with opened(source) as sensor, Sampler(sensor, watch_s=_WATCH_S) as sampler:
        info = sensor.info
        note = PowerNote(source=info.name, scope=info.scope, quality=info.quality, reason=None)
        yield (sampler, info), note


def origin(sensor: "tuple[Sampler, SourceInfo] | None") -> str:
    """Where energies come from, in so many words that those of another origin are not mixed in."""
    if sensor is None:
        return "none"
    info = sensor[1]
    return f"{info.name}, {info.sensor}, {info.total_rule}, {info.quality}"


def is_suspect(sensor: "tuple[Sampler, SourceInfo] | None") -> bool:
    """Whether a reading has contradicted itself by now."""
    return sensor is not None and sensor[0].was_suspect


def checked(
    note: PowerNote,
    gemms: tuple[GemmCost, ...],
    sensor: "tuple[Sampler, SourceInfo] | None",
    *,
    was_suspect: bool = False,
) -> PowerNote:
    """The note after the measurement: what the sensor did not tell, and whether to believe it.

    `was_suspect` is of an interrupted run whose energies are among these.
    """
    from lpvit_profilers.base import STUCK

    if sensor is None:
        return note
    silent = sum(gemm.energy_mj is None for gemm in gemms)
    sampler, info = sensor
    stuck = sampler.never_moved and not info.has_counter and info.quality != "estimated"
    slowed = sorted(
        {
            name
            for noted in sampler.conditions(begin_ns=0, end_ns=time.monotonic_ns())
            for name in noted.throttling or ()
        }
    )
    contradicts = sampler.was_suspect or was_suspect
    suspect = contradicts or stuck
    said = [
        *([_CONTRADICT] if contradicts else []),
        *([STUCK] if stuck else []),
        *([f"the device was throttled ({', '.join(slowed)})"] if slowed else []),
        *([f"no energy for {silent} of {len(gemms)} forms"] if silent else []),
    ]
    quality = "unavailable" if silent == len(gemms) else "suspect" if suspect else note.quality
    return msgspec.structs.replace(note, quality=quality, reason="; ".join(said) or None)
