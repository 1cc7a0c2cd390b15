"""What every power source is: a small protocol and the records that pass through it.

A source never invents a number: a rail that cannot be read is absent from the sample, a total
that cannot be formed is None and stands beside a reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from lpvit_profilers.nvml_probe import SensorTiming

# What a total covers. "module" is a sum of rails that has no sensor of its own at the input.
Scope = Literal["module_input", "board_input", "module", "gpu_board", "rail", "cpu_package"]
# The part of the machine that works: a total has to contain it, or it measures something else.
WorkingPart = Literal["cpu", "gpu"]
CONTAINING: Mapping[WorkingPart, Sequence[Scope]] = {
    "cpu": ("module_input", "board_input", "module", "cpu_package"),
    "gpu": ("module_input", "board_input", "module", "gpu_board"),
}
Quality = Literal["measured", "summed", "estimated", "suspect", "unavailable"]
# Power never stands still: so many equal readings come from a sensor that does.
STUCK_AFTER = 20
STUCK = "the sensor's reading never moved; it is stuck, or its step is too wide"


class SourceInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a source is, once it is open.

    `total_rule` says which rail, or which sum, is the total. `resolution_mw` is one step of the
    total where it is known. `period_s` is how often the sensor has something new and
    `averaging_s` how far back one reading looks. Where `power_from_counter`, power is the step of
    the energy counter and tells nothing beside it. `gain_class` is a stated relative error of the
    sensor's gain; None means that nobody has calibrated it.
    """

    name: str
    sensor: str
    scope: Scope
    quality: Quality
    total_rule: str | None
    rails: tuple[str, ...]
    resolution_mw: float | None
    period_s: float
    averaging_s: float
    has_counter: bool
    gain_class: float | None
    power_from_counter: bool = False
    notes: tuple[str, ...] = ()


class PowerSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One reading. `t_ns` is time.monotonic_ns() when the value became known.

    `energy_mj` is a counter that only grows, where the source has one; `counter_gaps` is how often
    it lost count since the opening, and two of its values may be subtracted only where that is the
    same. `module_mw` is the sum of the module's own rails on a board whose total is the board
    input.
    """

    t_ns: int
    rails_mw: dict[str, float]
    total_mw: float | None
    quality: Quality
    energy_mj: float | None = None
    counter_gaps: int = 0
    module_mw: float | None = None
    reason: str | None = None


class Conditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can spoil a measurement, as the source can see it; what it cannot see is None.

    `throttling` names what slows the device at this moment, () is nothing. `throttle_events` is a
    counter.
    """

    temperature_c: float | None = None
    clock_mhz: float | None = None
    throttling: tuple[str, ...] | None = None
    throttle_events: int | None = None


class PowerSource(Protocol):
    """Open, sample, close. `info` may be read only while the source is open.

    open() raises EnvironmentUnfitError where the sensor is absent or forbidden and
    MissingDependencyError where a library is; sample() never raises for a sensor that fails.
    """

    @property
    def info(self) -> SourceInfo: ...

    def open(self) -> None: ...

    def sample(self) -> PowerSample: ...

    def conditions(self) -> Conditions: ...

    def close(self) -> None: ...


@runtime_checkable
class ProbesAveraging(Protocol):
    """A source that can find on site how far back one of its readings looks."""

    def probe_averaging(self, load: Callable[[], object], *, for_s: float) -> "SensorTiming":
        """Step from idle to `load`, called again and again, and remember what `info` then says."""
        ...


SourceT = TypeVar("SourceT", bound=PowerSource)


@contextmanager
def opened(source: SourceT) -> Iterator[SourceT]:
    """Hold a source open for the length of a with block."""
    source.open()
    try:
        yield source
    finally:
        source.close()
