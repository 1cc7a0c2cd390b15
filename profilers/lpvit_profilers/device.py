"""Who this device is, and whether two measurements come from comparable devices.

    identity = identify()
    fingerprint(identity)           # one short text for file headers
    differences(theirs, identity)   # the sentences to print when it does not match

What is not known is None. Temperatures, present clocks, fan and supply voltage are recorded
with a measurement, but do not make it incomparable.
"""

import hashlib
import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from lpvit_profilers import machine, tegra
from lpvit_profilers.machine import Clock
from lpvit_profilers.sysfs import read_text
from lpvit_profilers.tegra import Command, PowerMode, run_command

_ROOT = Path("/")
# Distributions whose version changes what is measured, asked of the metadata, never imported.
_RUNTIMES = ("openvino", "onnxruntime", "tensorrt", "torch", "numpy")
# Rails that are fed by the supply itself, best first.
_SUPPLY_RAILS = ("VIN", "VDD_IN", "POM_5V_IN", "VDD_GPU_SOC")


class DeviceIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine and the state it was in. See `COMPARED` for the part that decides."""

    machine: str  # "x86_64", "aarch64"
    board_model: str | None
    soc: str | None
    l4t: str | None
    jetpack: str | None
    os: str | None
    kernel: str | None
    cpu_model: str | None
    cpu_isa: tuple[str, ...] | None
    logical_cores: int | None
    cpus_allowed: str | None
    cpu_quota: float | None
    memory_mb: int | None
    power_mode: PowerMode | None
    cpu_clocks: tuple[Clock, ...]
    gpu_clocks: tuple[Clock, ...]
    gpus: tuple[str, ...]
    nvidia_driver: str | None
    cuda: str | None
    runtimes: dict[str, str]
    emc_mhz: float | None
    fans_pwm: dict[str, int]
    temperatures_c: dict[str, float]
    supply_mv: int | None
    euid: int


def identify(*, root: Path = _ROOT, command: Command = run_command) -> DeviceIdentity:
    """Read the identity of this machine. Needs no root rights and imports no vendor library.

    `root` is where the file system starts, and `command` runs `nvpmodel -q`: tests replace both.
    """
    l4t = tegra.l4t_version(root)
    return DeviceIdentity(
        machine=platform.machine(),
        board_model=_board_model(root),
        soc=tegra.soc(root),
        l4t=l4t,
        jetpack=tegra.jetpack_version(l4t),
        os=_os_name(root),
        kernel=read_text(root / "proc/sys/kernel/osrelease"),
        cpu_model=machine.cpu_model(root),
        cpu_isa=machine.cpu_isa(root),
        logical_cores=machine.logical_cores(root),
        cpus_allowed=machine.cpus_allowed(root),
        cpu_quota=machine.cpu_quota(root),
        memory_mb=machine.memory_mb(root),
        power_mode=tegra.power_mode(command) if tegra.is_tegra(root) else None,
        cpu_clocks=machine.cpu_clocks(root),
        gpu_clocks=machine.gpu_clocks(root),
        gpus=_nvidia_gpus(root),
        nvidia_driver=_nvidia_driver(root),
        cuda=_cuda_version(root),
        runtimes=_runtime_versions(root),
        emc_mhz=machine.emc_mhz(root),
        fans_pwm=machine.fans_pwm(root),
        temperatures_c=machine.temperatures_c(root),
        supply_mv=_supply_mv(root),
        euid=os.geteuid(),
    )


def _board_model(root: Path) -> str | None:
    return read_text(root / "proc/device-tree/model") or read_text(
        root / "sys/class/dmi/id/product_name"
    )


def _os_name(root: Path) -> str | None:
    found = re.search(
        r'^PRETTY_NAME="?([^"\n]+)', read_text(root / "etc/os-release") or "", re.MULTILINE
    )
    return found[1] if found else None


def _nvidia_gpus(root: Path) -> tuple[str, ...]:
    """Names of the GPUs that NVIDIA's kernel driver serves, without loading NVML."""
    texts = (
        read_text(path) or ""
        for path in sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    )
    found = (re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE) for text in texts)
    return tuple(match[1] for match in found if match)


def _nvidia_driver(root: Path) -> str | None:
    text = read_text(root / "proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", text)
    return found[1] if found else None


def _cuda_version(root: Path) -> str | None:
    """Version of the toolkit under /usr/local/cuda, the one that JetPack installs."""
    text = read_text(root / "usr/local/cuda/version.json") or ""
    found = re.search(r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([\d.]+)"', text)
    return found[1] if found else None


def _runtime_versions(root: Path) -> dict[str, str]:
    found = {name: text for name in _RUNTIMES if (text := _installed(name))}
    if "tensorrt" not in found and (text := _debian_tensorrt(root)):
        found["tensorrt"] = text
    return found


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _debian_tensorrt(root: Path) -> str | None:
    """JetPack installs TensorRT as Debian packages, which a plain virtual environment hides."""
    text = read_text(root / "var/lib/dpkg/status") or ""
    found = re.search(r"^Package: libnvinfer\d+\n(?:.+\n)*?Version: (\S+)", text, re.MULTILINE)
    return found[1].partition("-")[0] if found else None


def _supply_mv(root: Path) -> int | None:
    from lpvit_profilers.rails import find_rails

    by_name = {rail.name: rail for rail in find_rails(root)}
    for name in _SUPPLY_RAILS:
        if name in by_name and (value := by_name[name].read_voltage_mv()) is not None:
            return value
    return None


def _caps(clocks: tuple[Clock, ...]) -> list[tuple[str, str | None, float | None, float | None]]:
    return [(c.name, c.governor, c.min_mhz, c.max_mhz) for c in clocks]


# What must agree before two measurements are compared, in the words that a refusal prints.
COMPARED: dict[str, Callable[[DeviceIdentity], Any]] = {
    "machine architecture": lambda d: d.machine,
    "board": lambda d: d.board_model,
    "SoC": lambda d: d.soc,
    "L4T release": lambda d: d.l4t,
    "CPU": lambda d: d.cpu_model,
    "CPU instruction sets": lambda d: d.cpu_isa,
    "online cores": lambda d: d.logical_cores,
    "number of cores this process may use": lambda d: machine.count_cpu_list(d.cpus_allowed),
    "container's CPU limit": lambda d: d.cpu_quota,
    # Linux's share of the memory moves a little with every kernel.
    "memory in GB": lambda d: None if d.memory_mb is None else round(d.memory_mb / 1024),
    "power mode": lambda d: d.power_mode and f"{d.power_mode.name} (id {d.power_mode.id})",
    "CPU governor and clock caps": lambda d: _caps(d.cpu_clocks),
    "GPU governor and clock caps": lambda d: _caps(d.gpu_clocks),
    "GPUs": lambda d: d.gpus,
    "NVIDIA driver": lambda d: d.nvidia_driver,
    "OpenVINO": lambda d: d.runtimes.get("openvino"),
    "ONNX Runtime": lambda d: d.runtimes.get("onnxruntime"),
    "TensorRT": lambda d: d.runtimes.get("tensorrt"),
}


def fingerprint(identity: DeviceIdentity) -> str:
    """Sixteen hex digits over everything in `COMPARED`; equal means comparable."""
    parts = [(name, part(identity)) for name, part in COMPARED.items()]
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]


def differences(a: DeviceIdentity, b: DeviceIdentity) -> tuple[str, ...]:
    """What makes measurements of `a` and `b` incomparable, "name: a's value, then b's"."""
    return tuple(
        f"{name}: {_shown(part(a))} against {_shown(part(b))}"
        for name, part in COMPARED.items()
        if part(a) != part(b)
    )


def _shown(value: object) -> str:
    return "unknown" if value is None else str(value)
