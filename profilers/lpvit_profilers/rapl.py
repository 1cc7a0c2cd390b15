"""Energy of x86 processors from RAPL, through /sys/class/powercap.

The domains nest (psys holds the package, the package holds core and uncore) and the memory-mapped
view shows the same registers again, so only packages are added up; dram is shown as a rail of its
own. Counters wrap at max_energy_range_uj, and start again where the driver is loaded anew, which
looks the same but for the power that it would mean. Since Linux 5.10 only root may read them
(CVE-2020-8694).
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers import machine
from lpvit_profilers.base import Conditions, PowerSample, SourceInfo
from lpvit_profilers.sysfs import read_int, read_text

REMEDY = "sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj (until the next boot)"
# Intel's manual gives about 1 ms between updates of the counters.
_PERIOD_S = 0.001
# No package and no board with one comes near it: more means that the counter did not just count.
_MAX_POWER_W = 2000.0
# A counter that moves in steps may show the energy of this much more time than has passed.
_LAG_S = 0.1
_NOTES = {
    "package-": "only the processor, without board, disks and power supply",
    "psys": "what the board's maker put behind this counter, as a rule everything but the supply",
}


class RaplSource:
    """Every processor package; the total is their sum. The first sample has no power yet.

    With `whole_platform` the psys domain is the total instead, on machines that have it.
    """

    def __init__(self, root: Path = Path("/"), *, whole_platform: bool = False) -> None:
        self._root = root
        self._prefix = "psys" if whole_platform else "package-"
        self._domains: dict[str, _Domain] = {}
        self._counted: tuple[str, ...] = ()
        self._info: SourceInfo | None = None
        self._last: tuple[int, dict[str, float]] | None = None

    @property
    def info(self) -> SourceInfo:
        assert self._info is not None, "the source is not open"
        return self._info

    def open(self) -> None:
        """Raises EnvironmentUnfitError where there is no RAPL or this user may not read it."""
        zones = _zones(self._root / "sys/class/powercap")
        dram = [name for name in zones if name.endswith(" dram")]
        counted = [n for n in zones if n.startswith(self._prefix) and n not in dram]
        if not counted:
            raise EnvironmentUnfitError(
                f"no RAPL domain {self._prefix}* under {self._root / 'sys/class/powercap'}; it "
                "exists on bare x86 machines with intel_rapl_common loaded, not in most virtual "
                "machines and not on ARM"
            )
        names = [*counted, *dram]
        self._counted = tuple(counted)
        try:
            for name in names:
                self._domains[name] = _Domain(zones[name])
        except EnvironmentUnfitError:
            self.close()
            raise
        self._info = SourceInfo(
            name="rapl",
            sensor="powercap intel-rapl",
            scope="board_input" if self._prefix == "psys" else "cpu_package",
            quality="measured",
            total_rule="+".join(counted),
            rails=tuple(names),
            resolution_mw=None,
            period_s=_PERIOD_S,
            averaging_s=0.0,
            has_counter=True,
            power_from_counter=True,
            gain_class=None,
            notes=(_NOTES[self._prefix],),
        )

    def sample(self) -> PowerSample:
        """Counter since opening, and the mean power since the sample before."""
        t_ns = time.monotonic_ns()
        energy_mj = {
            name: value
            for name, domain in self._domains.items()
            if (value := domain.advance_mj(t_ns)) is not None
        }
        complete = all(name in energy_mj for name in self._counted)
        total = sum(energy_mj[name] for name in self._counted) if complete else None
        rails_mw = self._rails_mw(t_ns, energy_mj)
        powered = total is not None and all(name in rails_mw for name in self._counted)
        self._last = (t_ns, energy_mj)
        return PowerSample(
            t_ns=t_ns,
            rails_mw=rails_mw,
            total_mw=sum(rails_mw[name] for name in self._counted) if powered else None,
            quality="measured" if total is not None else "unavailable",
            energy_mj=total,
            counter_gaps=sum(self._domains[name].gaps for name in self._counted),
            reason=None if powered else self._why(complete),
        )

    def _rails_mw(self, t_ns: int, energy_mj: dict[str, float]) -> dict[str, float]:
        if self._last is None or t_ns <= self._last[0]:
            return {}
        seconds = (t_ns - self._last[0]) / 1e9
        before = self._last[1]
        return {n: (e - before[n]) / seconds for n, e in energy_mj.items() if n in before}

    def _why(self, complete: bool) -> str:
        if complete:
            return "power needs two samples"
        lost = [domain.lost for name, domain in self._domains.items() if name in self._counted]
        return next((text for text in lost if text), "a RAPL counter could not be read")

    def conditions(self) -> Conditions:
        """Hottest zone, and the fastest core's clock."""
        temperatures = machine.temperatures_c(self._root)
        clocks = [c.current_mhz for c in machine.cpu_clocks(self._root) if c.current_mhz]
        return Conditions(
            temperature_c=max(temperatures.values(), default=None),
            clock_mhz=max(clocks, default=None),
        )

    def close(self) -> None:
        for domain in self._domains.values():
            domain.close()
        self._domains, self._last, self._info = {}, None, None


class _Reading(NamedTuple):
    t_ns: int
    energy_uj: int


class _Domain:
    """One counter that wraps, made into one that only grows.

    `gaps` is how often it did something else; what passed in such a step is not counted. `lost`
    says what it did at the latest reading, None where it counted.
    """

    def __init__(self, zone: Path) -> None:
        path = zone / "energy_uj"
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise EnvironmentUnfitError(f"{path} is readable for root only; {REMEDY}") from error
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot open {path}: {error.strerror}") from error
        self._name = zone.name
        self._range_uj = read_int(zone / "max_energy_range_uj")
        self._previous = self._read(time.monotonic_ns())
        self._total_uj = 0
        self.gaps = 0
        self.lost: str | None = None

    def advance_mj(self, t_ns: int) -> float | None:
        """Energy since opening, without the gaps; None when unreadable, or in a gap right now."""
        now = self._read(t_ns)
        before, self.lost = self._previous, None
        if now is None:
            return None
        self._previous = now
        if before is not None:  # None: powered off when it was opened
            step_uj = self._step_uj(before, now)
            self.lost = step_uj if isinstance(step_uj, str) else None
            self.gaps += isinstance(step_uj, str)
            self._total_uj += step_uj if isinstance(step_uj, int) else 0
        return None if self.lost else self._total_uj / 1000

    def _step_uj(self, before: "_Reading", now: "_Reading") -> int | str:
        """What passed between two readings, or why that cannot be told."""
        seconds = (now.t_ns - before.t_ns) / 1e9
        most_uj = _MAX_POWER_W * (seconds + _LAG_S) * 1e6
        step_uj = now.energy_uj - before.energy_uj
        if step_uj < 0 and not self._range_uj:
            return f"{self._name} fell by {-step_uj / 1e6:.3g} J and does not say where it wraps"
        if self._range_uj and _MAX_POWER_W * seconds * 1e6 > self._range_uj:
            return f"{self._name} was not read for {seconds:.0f} s, in which it may wrap unseen"
        wrapped_uj = step_uj + (self._range_uj or 0) if step_uj < 0 else step_uj
        if wrapped_uj > most_uj:
            what = "fell" if step_uj < 0 else "rose"
            return (
                f"{self._name} {what} by {abs(step_uj) / 1e6:.3g} J in {seconds:.3g} s; it was "
                "reset, or it is not believable"
            )
        return wrapped_uj

    def _read(self, t_ns: int) -> "_Reading | None":
        energy_uj = self._read_uj()
        return None if energy_uj is None else _Reading(t_ns, energy_uj)

    def _read_uj(self) -> int | None:
        try:
            return int(os.pread(self._handle, 32, 0))
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        os.close(self._handle)


def _zones(powercap: Path) -> dict[str, Path]:
    """Domains by name; dram carries its package's. A second view of the same domain is dropped.

    intel-rapl sorts before intel-rapl-mmio, so the register view wins over the memory-mapped one.
    """
    found: dict[str, Path] = {}
    patterns = ("intel-rapl:*", "intel-rapl/intel-rapl:*", "intel-rapl*/intel-rapl*:*")
    for zone in (z for pattern in patterns for z in sorted(powercap.glob(pattern))):
        name = read_text(zone / "name")
        if name in (None, "core", "uncore"):
            continue
        found.setdefault(str(name), zone)
        for part in sorted(zone.glob(f"{zone.name}:*")):
            if read_text(part / "name") == "dram":
                found.setdefault(f"{name} dram", part)
    found.pop("dram", None)
    return found
