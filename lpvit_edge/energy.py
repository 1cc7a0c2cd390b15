"""Energy per image of engines, when this machine has a sensor that can be believed."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lpvit_edge.records import Energy

if TYPE_CHECKING:
    from lpvit_profilers.base import WorkingPart
    from lpvit_profilers.detect import Detected
    from lpvit_profilers.energy_records import EnergyMeasurement


# Where each engine works; another one may work anywhere.
_WORKING: "Mapping[str, WorkingPart]" = {"openvino": "cpu", "tensorrt": "gpu"}


def working_part(engine: str) -> "WorkingPart | None":
    """The part of the machine whose power an engine's energies are made of; None is unknown."""
    return _WORKING.get(engine)


def covers_work(scope: str | None, engine: str) -> bool:
    """Whether a total of `scope` contains the part where `engine` works, if that is known."""
    from lpvit_profilers.base import CONTAINING

    part = working_part(engine)
    return part is None or scope in CONTAINING[part]


def energies(
    runs: Mapping[str, Callable[[], object]], *, engine: str, window_s: float
) -> dict[str, Energy]:
    """Energy of one call of each, in turns, by the best sensor that covers where `engine` works.

    Without a sensor every entry is None with the reason. An estimate is never taken.
    """
    from lpvit_profilers.base import opened
    from lpvit_profilers.detect import default_source, detect
    from lpvit_profilers.energy import measure_energies

    working = working_part(engine)
    source = default_source(working=working)
    if source is None:
        return dict.fromkeys(runs, unavailable(why_no_energy(detect(), working)))
    with opened(source) as sensor:
        found = measure_energies(runs, sensor, window_s=window_s)
    return {name: _record(measured) for name, measured in found.items()}


# How the reasons of lpvit_profilers.detect begin where there is nothing to read. Any other reason
# comes from a sensor that is there and refuses (no permission, no total, contradictions).
_ABSENT = ("no ", "this is not a Jetson", "cannot import pynvml", "NVML finds no GPU", "off; ")


def why_no_energy(found: "Sequence[Detected]", working: "WorkingPart | None" = None) -> str:
    """What keeps the sensors that exist from being read, or that there are none."""
    from lpvit_profilers.detect import why_none

    refusing = [d for d in found if d.usable or not _is_absent(d.reason)]
    return why_none(refusing, working=working) or "no power sensor on this machine"


def _is_absent(reason: str) -> bool:
    return reason.startswith(_ABSENT) and "permission" not in reason.lower()


def unavailable(reason: str) -> Energy:
    """No energy, and why."""
    return Energy(
        per_image_mj=None,
        ci95_mj=None,
        mean_power_mw=None,
        source=None,
        scope=None,
        quality="unavailable",
        reason=reason,
    )


def _record(measured: "EnergyMeasurement") -> Energy:
    return Energy(
        per_image_mj=measured.gross_mj,
        ci95_mj=measured.ci95_mj,
        mean_power_mw=measured.mean_power_mw,
        source=measured.source,
        scope=measured.scope,
        quality=measured.quality,
        reason="; ".join(measured.reasons) or None,
    )
