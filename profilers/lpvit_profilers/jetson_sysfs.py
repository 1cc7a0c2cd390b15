"""Power of a Jetson from its INA3221 and INA238 sensors in sysfs. Needs no root.

One reading of an INA3221 looks at 1.1 ms of current, once in a cycle of 6.6 ms (default
configuration 0x7127: no averaging, three channels, two conversions each; data sheet and
Linux drivers/hwmon/ina3221.c). The sensor's own averaging would help, but its registers belong
to root and to the over-current alarm, so they are left alone.
"""

import os
import time
from pathlib import Path

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers import machine
from lpvit_profilers.base import Conditions, PowerSample, Quality, SourceInfo
from lpvit_profilers.rails import Rail, find_rails
from lpvit_profilers.sysfs import numbered, read_int, read_text
from lpvit_profilers.totals import THOR_MODULE, TotalRule, is_suspect, total_rule, why_suspect

_CYCLE_S = 0.0066
_WINDOW_S = 0.0011


class JetsonSysfsSource:
    """All rails of the board; the total follows the labels, see lpvit_profilers.totals."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._handles: dict[str, _Handles] = {}
        self._rule: TotalRule | None = None
        self._info: SourceInfo | None = None

    @property
    def info(self) -> SourceInfo:
        assert self._info is not None, "the source is not open"
        return self._info

    def open(self) -> None:
        """Open the sensors. Raises EnvironmentUnfitError where there is none, or no total."""
        rails = find_rails(self._root)
        if not rails:
            raise EnvironmentUnfitError(
                f"no INA3221 or INA238 sensor under {self._root / 'sys/bus/i2c/drivers'}; on a "
                "Jetson the module's device tree must describe it, in a container /sys must be "
                "visible"
            )
        self._rule = total_rule(rail.name for rail in rails)
        if self._rule is None:
            names = ", ".join(rail.name for rail in rails)
            raise EnvironmentUnfitError(
                f"the rails {names} hold no total that is known (see lpvit_profilers.totals); "
                "adding them up could count power twice"
            )
        self._handles = {rail.name: _Handles(rail) for rail in rails}
        self._info = _describe(rails, self._rule)

    def sample(self) -> PowerSample:
        """Read every rail; one that does not answer is left out."""
        assert self._rule is not None, "the source is not open"
        readings = {name: handles.power_mw() for name, handles in self._handles.items()}
        t_ns = time.monotonic_ns()
        rails_mw = {name: value for name, value in readings.items() if value is not None}
        total_mw = self._rule.total_mw(rails_mw)
        suspect = is_suspect(total_mw, rails_mw, step_mw=self.info.resolution_mw)
        return PowerSample(
            t_ns=t_ns,
            rails_mw=rails_mw,
            total_mw=total_mw,
            quality=_quality(self._rule, total_mw, suspect),
            module_mw=THOR_MODULE.total_mw(rails_mw) if "VIN" in self._handles else None,
            reason=_reason(self._rule, rails_mw, suspect),
        )

    def conditions(self) -> Conditions:
        """Hottest zone, GPU clock, over-current counters and alarms."""
        temperatures = machine.temperatures_c(self._root)
        clocks = [c.current_mhz for c in machine.gpu_clocks(self._root) if c.current_mhz]
        return Conditions(
            temperature_c=max(temperatures.values(), default=None),
            clock_mhz=max(clocks, default=None),
            throttling=tuple(_alarms(self._root)),
            throttle_events=_over_current_events(self._root),
        )

    def close(self) -> None:
        for handles in self._handles.values():
            handles.close()
        self._handles = {}
        self._info = None


class _Handles:
    """Open files of one rail, read with os.pread so that no position has to be reset."""

    def __init__(self, rail: Rail) -> None:
        self._power_unit_mw = rail.power_unit_mw
        self._power = _open(rail.power)
        # The product is needed only where the chip does not multiply itself.
        self._voltage = _open(rail.voltage) if self._power is None else None
        self._current = _open(rail.current) if self._power is None else None

    def power_mw(self) -> float | None:
        if self._power is not None:
            value = _read(self._power)
            return None if value is None else value * self._power_unit_mw
        voltage_mv, current_ma = _read(self._voltage), _read(self._current)
        if voltage_mv is None or current_ma is None:
            return None
        return voltage_mv * current_ma / 1000

    def close(self) -> None:
        for handle in (self._power, self._voltage, self._current):
            if handle is not None:
                os.close(handle)


def _open(path: Path | None) -> int | None:
    if path is None:
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _read(handle: int | None) -> int | None:
    """A number, None for a sensor that is powered off (EAGAIN), empty or gone."""
    if handle is None:
        return None
    try:
        return int(os.pread(handle, 32, 0))
    except (OSError, ValueError):
        return None


def _describe(rails: tuple[Rail, ...], rule: TotalRule) -> SourceInfo:
    steps = [rail.resolution_mw() for rail in rails if rail.name in rule.rails]
    known = [step for step in steps if step is not None]
    return SourceInfo(
        name="jetson-sysfs",
        sensor=", ".join(dict.fromkeys(rail.sensor for rail in rails)),
        scope=rule.scope,
        quality=rule.quality,
        total_rule=rule.text,
        rails=tuple(rail.name for rail in rails),
        # Rounding of independent rails adds like noise.
        resolution_mw=sum(s * s for s in known) ** 0.5 if len(known) == len(steps) else None,
        period_s=_CYCLE_S,
        averaging_s=_WINDOW_S,
        has_counter=False,
        gain_class=None,  # no published calibration of these sensors on a Jetson
    )


def _quality(rule: TotalRule, total_mw: float | None, suspect: bool) -> Quality:
    if total_mw is None:
        return "unavailable"
    return "suspect" if suspect else rule.quality


def _reason(rule: TotalRule, rails_mw: dict[str, float], suspect: bool) -> str | None:
    missing = [name for name in rule.rails if name not in rails_mw]
    if missing:
        return f"{', '.join(missing)} did not answer; the domain may be powered off"
    if suspect:
        return why_suspect(rule)
    return None


def _over_current_events(root: Path) -> int | None:
    """Sum of the soctherm over-current counters, which only grow, None where there are none."""
    counts = [
        read_int(counter)
        for chip in numbered(root / "sys/class/hwmon", "hwmon*")
        if read_text(chip / "name") == "soctherm_oc"
        for counter in sorted(chip.glob("oc*_event_cnt"))
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _alarms(root: Path) -> list[str]:
    """Rails whose current is above its warning or critical limit at this moment."""
    chips = sorted((root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*"))
    return [
        f"{read_text(chip / f'in{channel}_label')} {limit} current"
        for chip in chips
        for channel in (1, 2, 3)
        for limit in ("max", "crit")
        if read_int(chip / f"curr{channel}_{limit}_alarm") == 1
    ]
