"""Energy of x86 processors from RAPL, through /sys/class/powercap.

The domains nest (psys holds the package, the package holds core and uncore) and the memory-mapped
view shows the same registers again, so only packages are added up; dram is shown as a rail of its
own. Counters wrap at max_energy_range_uj. Since Linux 5.10 only root may read them
(CVE-2020-8694).
"""

import os
import time
from pathlib import Path

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers import machine
from lpvit_profilers.base import Conditions, PowerSample, SourceInfo
from lpvit_profilers.sysfs import read_int, read_text

REMEDY = "sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj (until the next boot)"
# Intel's manual gives about 1 ms between updates of the counters.
_PERIOD_S = 0.001
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
            gain_class=None,
            notes=(_NOTES[self._prefix],),
        )

    def sample(self) -> PowerSample:
        """Counter since opening, and the mean power since the sample before."""
        t_ns = time.monotonic_ns()
        energy_mj = {
            name: value
            for name, domain in self._domains.items()
            if (value := domain.advance_mj()) is not None
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
            reason=None if powered else _why(complete),
        )

    def _rails_mw(self, t_ns: int, energy_mj: dict[str, float]) -> dict[str, float]:
        if self._last is None or t_ns <= self._last[0]:
            return {}
        seconds = (t_ns - self._last[0]) / 1e9
        before = self._last[1]
        return {n: (e - before[n]) / seconds for n, e in energy_mj.items() if n in before}

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


class _Domain:
    """One counter that wraps, made into one that only grows."""

    def __init__(self, zone: Path) -> None:
        path = zone / "energy_uj"
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError as error:
            raise EnvironmentUnfitError(f"{path} is readable for root only; {REMEDY}") from error
        except OSError as error:
            raise EnvironmentUnfitError(f"cannot open {path}: {error.strerror}") from error
        self._range_uj = read_int(zone / "max_energy_range_uj")
        self._previous_uj = self._read_uj()
        self._total_uj = 0

    def advance_mj(self) -> float | None:
        """Energy since opening; None when the counter cannot be read or wraps unpredictably."""
        now_uj = self._read_uj()
        if self._previous_uj is None:  # powered off when it was opened
            self._previous_uj = now_uj
        if now_uj is None or self._previous_uj is None:
            return None
        step_uj = now_uj - self._previous_uj
        if step_uj < 0:
            if not self._range_uj:
                return None
            step_uj += self._range_uj
        self._previous_uj = now_uj
        self._total_uj += step_uj
        return self._total_uj / 1000

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


def _why(complete: bool) -> str:
    return "power needs two samples" if complete else "a RAPL counter could not be read"
