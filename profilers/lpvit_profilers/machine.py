"""Processor, memory, clocks, fans and temperatures, as the kernel's files show them.

Every function takes the root of the file system, so that tests can hand it a fake one.
"""

import re
from pathlib import Path

import msgspec

from lpvit_profilers.sysfs import numbered, read_int, read_text, to_int

# Instruction sets that decide which kernel runs: the kernel's flag -> the name used here.
_ISA = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",
    "asimd": "asimd",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
}
# Implementer and part -> name, from Linux arch/arm64/include/asm/cputype.h.
_ARM_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd83"): "Neoverse-V3AE",
    ("0x4e", "0x003"): "NVIDIA Denver 2",
    ("0x4e", "0x004"): "NVIDIA Carmel",
}


class Clock(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One clock domain: who sets it, its caps, and where it stood when it was read."""

    name: str
    governor: str | None
    min_mhz: float | None
    max_mhz: float | None
    current_mhz: float | None


def cpu_model(root: Path) -> str | None:
    """Name of the processor; on ARM the core's name, or its numbers where it is not known."""
    text = read_text(root / "proc/cpuinfo") or ""
    if found := _field(text, "model name"):
        return found
    part, implementer = _field(text, "CPU part"), _field(text, "CPU implementer")
    if part is None or implementer is None:
        return None
    known = _ARM_CORES.get((implementer.lower(), part.lower()))
    return known or f"ARM implementer {implementer} part {part}"


def cpu_isa(root: Path) -> tuple[str, ...] | None:
    """The instruction sets, of those that decide which kernel runs, in alphabetical order."""
    text = read_text(root / "proc/cpuinfo") or ""
    flags = _field(text, "flags") or _field(text, "Features")
    return tuple(sorted({_ISA[f] for f in flags.split() if f in _ISA})) if flags else None


def _field(cpuinfo: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*: (.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else None


def logical_cores(root: Path) -> int | None:
    """Cores that are online now."""
    return count_cpu_list(read_text(root / "sys/devices/system/cpu/online"))


def cpus_allowed(root: Path) -> str | None:
    """The cores this process may run on, as the kernel writes them: "0-3,6"."""
    status = read_text(root / "proc/self/status") or ""
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)$", status, re.MULTILINE)
    return found[1] if found else None


def cpu_quota(root: Path) -> float | None:
    """Cores' worth of time that a container's limit leaves, None without a limit (cgroup 2)."""
    quota, _, period = (read_text(root / "sys/fs/cgroup/cpu.max") or "").partition(" ")
    limit_us, period_us = to_int(quota), to_int(period)
    return limit_us / period_us if limit_us and period_us else None


def count_cpu_list(text: str | None) -> int | None:
    """
    >>> count_cpu_list("0-3,6")
    5
    """
    if not text or not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text):
        return None
    ranges = [part.partition("-")[::2] for part in text.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, last in ranges)


def memory_mb(root: Path) -> int | None:
    """Memory that Linux can use, in MB of 2**20 bytes; on Jetson the GPU shares it."""
    text = read_text(root / "proc/meminfo") or ""
    found = re.search(r"^MemTotal:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) // 1024 if found else None


def cpu_clocks(root: Path) -> tuple[Clock, ...]:
    """One clock for each cpufreq policy; a virtual machine usually has none."""
    folder = root / "sys/devices/system/cpu/cpufreq"
    return tuple(
        Clock(
            name=f"cpu{read_text(policy / 'affected_cpus') or policy.name}",
            governor=read_text(policy / "scaling_governor"),
            min_mhz=_mhz(read_int(policy / "scaling_min_freq"), per_mhz=1e3),
            max_mhz=_mhz(read_int(policy / "scaling_max_freq"), per_mhz=1e3),
            current_mhz=_mhz(read_int(policy / "scaling_cur_freq"), per_mhz=1e3),
        )
        for policy in numbered(folder, "policy*")
    )


def gpu_clocks(root: Path) -> tuple[Clock, ...]:
    """Devfreq clocks of an integrated GPU: "17000000.gpu" on Orin, "gpu-gpc-0" on Thor."""
    return tuple(
        Clock(
            name=device.name,
            governor=read_text(device / "governor"),
            min_mhz=_mhz(read_int(device / "min_freq"), per_mhz=1e6),
            max_mhz=_mhz(read_int(device / "max_freq"), per_mhz=1e6),
            current_mhz=_mhz(read_int(device / "cur_freq"), per_mhz=1e6),
        )
        for device in numbered(root / "sys/class/devfreq", "*gpu*")
    )


def emc_mhz(root: Path) -> float | None:
    """Clock of the memory controller on Jetson; only root may read it."""
    return _mhz(read_int(root / "sys/kernel/debug/bpmp/debug/clk/emc/rate"), per_mhz=1e6)


def _mhz(value: int | None, *, per_mhz: float) -> float | None:
    return None if value is None else value / per_mhz


def temperatures_c(root: Path) -> dict[str, float]:
    """Thermal zones that answer. Jetson's PMIC zone is a constant and is left out."""
    found = {}
    for zone in numbered(root / "sys/class/thermal", "thermal_zone*"):
        name, value = read_text(zone / "type"), read_int(zone / "temp")
        # A zone whose domain is off reads -256 C on older kernels and fails on newer ones.
        if name and value is not None and value > -100_000 and "PMIC" not in name.upper():
            found[name.removesuffix("-thermal")] = value / 1000
    return found


def fans_pwm(root: Path) -> dict[str, int]:
    """Duty of each fan, 0 to 255, under the name of its chip."""
    found = {}
    for chip in numbered(root / "sys/class/hwmon", "hwmon*"):
        value = read_int(chip / "pwm1")
        if value is not None:
            found[read_text(chip / "name") or chip.name] = value
    return found
