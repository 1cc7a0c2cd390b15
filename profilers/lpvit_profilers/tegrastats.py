"""Read the lines that Jetson's tegrastats prints, JetPack 4 to 7.2.

    VDD_IN 2532/2698                 JetPack 4: mW now / mean since tegrastats started
    VDD_IN 2763mW/2846mW             JetPack 5 and 6
    VIN 28906mW/27100mW/29871mW      JetPack 7.2: a third value, the highest so far

Only the first value is used: the mean starts with tegrastats, not with a measurement. Tokens
that are not known are passed over, because every JetPack adds some.
"""

import re

import msgspec

from lpvit_profilers.totals import is_suspect, total_rule

_RAIL = re.compile(
    r"(?<!\S)([A-Z][A-Z0-9_]*)\s+(\d{1,9})(?:mW)?/\d{1,9}(?:mW)?(?:/\d{1,9}(?:mW)?)?(?!\S)",
    re.ASCII,
)
_TEMPERATURE = re.compile(
    r"(?<!\S)([A-Za-z]\w{0,31})@(-?\d{1,5}(?:\.\d{1,6})?)C(?:/-?\d{1,5}(?:\.\d{1,6})?C)?(?!\S)",
    re.ASCII,
)
_GPU = re.compile(
    r"(?<!\S)GR3D_FREQ\s+(?:(\d{1,3})%)?(?:@(?:\[(\d{1,6}(?:,\d{1,6})*)\]|(\d{1,6})(?!\S)))?",
    re.ASCII,
)
_MEMORY = re.compile(r"(?<!\S)(RAM|SWAP)\s+(\d{1,9})/(\d{1,9})MB", re.ASCII)
_CPU = re.compile(r"(?<!\S)CPU\s+\[([^\]]*)\]", re.ASCII)
# "RAM 2344/7852" is what a line cut before "MB" leaves; it looks like a rail.
_NOT_RAILS = {"RAM", "SWAP", "IRAM"}


class TegrastatsLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one line says. What it does not say is None, or absent.

    `gpu_util` is 0 to 1. `cpu_cores_online` is 0 where the line lists no cores. `suspect` means
    that a rail exceeds the total it belongs to, as on carriers with swapped labels.
    """

    rails_mw: dict[str, float]
    total_mw: float | None
    total_rule: str | None
    gpu_util: float | None
    gpu_clock_mhz: float | None
    ram_used_mb: int | None
    ram_total_mb: int | None
    swap_used_mb: int | None
    swap_total_mb: int | None
    temperatures_c: dict[str, float]
    cpu_cores_online: int
    suspect: bool


def parse_line(line: str) -> TegrastatsLine:
    """Parse one line, whole or cut; never raises.

    >>> parse_line("GR3D_FREQ 63%@[621] cpu@53.9C VDD_IN 12479mW/4667mW").total_mw
    12479.0
    """
    rails_mw = {name: float(now) for name, now in _RAIL.findall(line) if name not in _NOT_RAILS}
    rule = total_rule(rails_mw)
    total_mw = rule.total_mw(rails_mw) if rule else None
    gpu_util, gpu_clock_mhz = _gpu(line)
    memory = {kind: (int(used), int(total)) for kind, used, total in _MEMORY.findall(line)}
    ram, swap = memory.get("RAM", (None, None)), memory.get("SWAP", (None, None))
    return TegrastatsLine(
        rails_mw=rails_mw,
        total_mw=total_mw,
        total_rule=rule.text if rule else None,
        gpu_util=gpu_util,
        gpu_clock_mhz=gpu_clock_mhz,
        ram_used_mb=ram[0],
        ram_total_mb=ram[1],
        swap_used_mb=swap[0],
        swap_total_mb=swap[1],
        temperatures_c=_temperatures_c(line),
        cpu_cores_online=_cores_online(line),
        suspect=is_suspect(total_mw, rails_mw),
    )


def _gpu(line: str) -> tuple[float | None, float | None]:
    """Utilisation 0 to 1 and the fastest cluster's clock; "@[1574,1574]" tells only the clock."""
    found = _GPU.search(line)
    if not found:
        return None, None
    percent, several, single = found.groups()
    clocks = several or single
    util = int(percent) / 100 if percent and int(percent) <= 100 else None
    return util, float(max(int(c) for c in clocks.split(","))) if clocks else None


def _temperatures_c(line: str) -> dict[str, float]:
    """Zones that measure: PMIC is a constant on every board, -256 C is a zone without power."""
    return {
        name: float(value)
        for name, value in _TEMPERATURE.findall(line)
        if name.upper() != "PMIC" and float(value) > -100
    }


def _cores_online(line: str) -> int:
    found = _CPU.search(line)
    return sum("%" in core for core in found[1].split(",")) if found else 0
