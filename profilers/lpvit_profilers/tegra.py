"""What says that this is a Jetson, and which one. Nothing here needs root."""

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from lpvit_profilers.sysfs import read_text

# L4T release -> JetPack, as NVIDIA's release notes pair them.
JETPACK_OF_L4T = {
    "32.7.1": "4.6.1",
    "35.4.1": "5.1.2",
    "36.4.3": "6.2",
    "36.5.0": "6.2.2",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
}
Command = Callable[[Sequence[str]], str | None]


class PowerMode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """nvpmodel's mode. The name is a set of clock caps, not a power budget."""

    id: int
    name: str


def is_tegra(root: Path = Path("/")) -> bool:
    """Whether this is a Jetson; inside a container only the device tree may say so."""
    return (root / "etc/nv_tegra_release").exists() or soc(root) is not None


def soc(root: Path = Path("/")) -> str | None:
    """The chip, "tegra234" for Orin, "tegra264" for Thor."""
    compatible = read_text(root / "proc/device-tree/compatible") or ""
    found = re.search(r"nvidia,(tegra\d+)", compatible)
    return found[1] if found else None


def nvml_is_mute(root: Path = Path("/")) -> bool:
    """Whether NVML tells nothing but the name here: every Tegra up to Orin.

    There it initialises and then answers NotSupported, or zeros, to every telemetry call.
    """
    chip = soc(root)
    return chip is not None and int(chip.removeprefix("tegra")) < 264


def l4t_version(root: Path = Path("/")) -> str | None:
    """Jetson Linux release, such as "36.4.3"."""
    text = read_text(root / "etc/nv_tegra_release") or ""
    found = re.search(r"# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", text)
    return f"{found[1]}.{found[2]}" if found else None


def jetpack_version(l4t: str | None) -> str | None:
    """JetPack of an L4T release, None where the pair is not known here."""
    return JETPACK_OF_L4T.get(l4t or "")


def run_command(arguments: Sequence[str]) -> str | None:
    """Output of a short read-only command, None where it is absent, fails or hangs."""
    try:
        done = subprocess.run(  # a fixed argument list, no shell
            arguments, capture_output=True, text=True, timeout=5, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def power_mode(command: Command = run_command) -> PowerMode | None:
    """The mode that `nvpmodel -q` reports; it may print warnings around it."""
    text = command(("nvpmodel", "-q")) or ""
    found = re.search(r"NV Power Mode:\s*(\S+)\s+(\d{1,4})\b", text)
    return PowerMode(id=int(found[2]), name=found[1]) if found else None
