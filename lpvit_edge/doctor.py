"""What this machine lacks, each finding with its remedy. Nothing vendor-made is imported,
TensorRT excepted where it is installed: see doctor_tensorrt.

ok        present
optional  absent, and only some verbs need it
warning   works, but slower or blind in some respect
unfit     broken, or nothing here can run a model: `lpvit doctor` exits with 3
"""

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import msgspec

from lpvit_profilers.detect import Detected, detect
from lpvit_profilers.device import DeviceIdentity, fingerprint, identify

Status = Literal["ok", "optional", "warning", "unfit"]
# Engine of this version -> the distributions, any one of which brings its library.
ENGINES: Mapping[str, Sequence[str]] = {"openvino": ("openvino",)}
_ENGINE_REMEDY = {"openvino": "pip install 'lpvit-edge[cpu]'"}
_LEAST_MEMORY_MB = 2000
WEAKLY_TYPED = "built weakly typed"
_KERNEL_ISA = {"x86_64": {"avx2", "fma"}, "aarch64": {"asimd"}}


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing that was looked at."""

    area: str
    name: str
    status: Status
    found: str
    remedy: str | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the doctor saw. `is_fit` is False when any finding is unfit."""

    device: DeviceIdentity
    fingerprint: str
    findings: tuple[Finding, ...]
    sources: tuple[Detected, ...]

    @property
    def is_fit(self) -> bool:
        return all(finding.status != "unfit" for finding in self.findings)


def examine(
    *,
    root: Path = Path("/"),
    engines: Mapping[str, Sequence[str]] = ENGINES,
    tdp_w: float | None = None,
) -> Report:
    """Look at this machine. `root` is where its file system starts."""
    device = identify(root=root)
    sources = detect(root, tdp_w=tdp_w)
    tensorrt = _tensorrt(device)
    findings = (
        *_environment(device),
        *_engines(engines, another=_builds(tensorrt)),
        _kernel(),
        _onnxruntime(),
        *tensorrt,
        _torch_pair(),
        _power(sources),
    )
    return Report(
        device=device, fingerprint=fingerprint(device), findings=findings, sources=sources
    )


def _environment(device: DeviceIdentity) -> tuple[Finding, ...]:
    return (
        Finding(area="environment", name="Python", status="ok", found=sys.version.split()[0]),
        _board(device),
        _cpu(device),
        _memory(device),
        _clocks(device),
    )


def _board(device: DeviceIdentity) -> Finding:
    parts = (device.board_model, device.soc, device.jetpack and f"JetPack {device.jetpack}")
    found = ", ".join(part for part in (*parts, device.os, *device.gpus) if part)
    return Finding(area="environment", name="device", status="ok", found=found or "unknown")


def _cpu(device: DeviceIdentity) -> Finding:
    """The native kernel's slowest path needs AVX2 with FMA, or NEON."""
    isa = set(device.cpu_isa or ())
    found = (
        f"{device.cpu_model or 'unknown'}, {device.cpus_allowed or '?'}: {' '.join(sorted(isa))}"
    )
    needed = _KERNEL_ISA.get(device.machine)
    if needed is None or not needed <= isa:
        wanted = " and ".join(sorted(needed or {"x86-64 or aarch64"}))
        remedy = f"the native kernel needs {wanted}; use another machine or the dense engine"
        return Finding(area="environment", name="CPU", status="warning", found=found, remedy=remedy)
    return Finding(area="environment", name="CPU", status="ok", found=found)


def _memory(device: DeviceIdentity) -> Finding:
    known = device.memory_mb
    if known is not None and known < _LEAST_MEMORY_MB:
        return Finding(
            area="environment",
            name="memory",
            status="warning",
            found=f"{known} MB",
            remedy="build engines on a larger machine of the same kind, or add swap",
        )
    found = "unknown" if known is None else f"{known} MB"
    return Finding(area="environment", name="memory", status="ok", found=found)


def _clocks(device: DeviceIdentity) -> Finding:
    clocks = (*device.cpu_clocks, *device.gpu_clocks)
    mode = f"mode {device.power_mode.name}, " if device.power_mode else ""
    if not clocks:
        return Finding(
            area="environment",
            name="clocks",
            status="ok",
            found=f"{mode}not visible (usual in a virtual machine)",
        )
    governors = sorted({clock.governor or "unknown" for clock in clocks})
    free = [g for g in governors if g not in ("performance", "userspace")]
    return Finding(
        area="environment",
        name="clocks",
        status="warning" if free else "ok",
        found=f"{mode}governor {', '.join(governors)}",
        remedy="measured times drift less with the performance governor (on Jetson: "
        "sudo jetson_clocks --store, and --restore afterwards)"
        if free
        else None,
    )


def _engines(engines: Mapping[str, Sequence[str]], *, another: bool) -> list[Finding]:
    """Each engine's library by its metadata; with none of them, nor `another`, nothing can run."""
    found = {name: _first_installed(needs) for name, needs in engines.items()}
    absent: Status = "optional" if another or any(found.values()) else "unfit"
    return [
        Finding(area="engine", name=name, status="ok", found=text)
        if text
        else Finding(
            area="engine",
            name=name,
            status=absent,
            found="absent",
            remedy=_ENGINE_REMEDY.get(name, f"pip install {engines[name][0]}"),
        )
        for name, text in found.items()
    ]


def _first_installed(distributions: Sequence[str]) -> str | None:
    return next((text for name in distributions if (text := installed(name))), None)


def installed(distribution: str) -> str | None:
    """Version of a distribution by its metadata, None where it is absent."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _kernel() -> Finding:
    """The compiled sparse kernel, a plain shared library inside lpvit_engines."""
    spec = find_spec("lpvit_engines")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    libraries = sorted(path.name for folder in folders for path in folder.glob("_*.so"))
    if libraries:
        found = ", ".join(libraries)
        return Finding(area="engine", name="native kernel", status="ok", found=found)
    return Finding(
        area="engine",
        name="native kernel",
        status="warning",
        found="absent",
        remedy="install a wheel, or a C++ compiler and then `pip install -e .`; without it sparse "
        "layers have no fast path",
    )


def _onnxruntime() -> Finding:
    found = _first_installed(("onnxruntime", "onnxruntime-gpu"))
    if found:
        return Finding(area="library", name="onnxruntime", status="ok", found=found)
    return Finding(
        area="library",
        name="onnxruntime",
        status="optional",
        found="absent",
        remedy="pip install 'lpvit-edge[prune]' to check exported models against it",
    )


def _tensorrt(device: DeviceIdentity) -> tuple[Finding, ...]:
    """Its presence and, where it is installed, whether it builds."""
    if found := device.runtimes.get("tensorrt"):
        from lpvit_edge.doctor_tensorrt import examine_tensorrt

        found = f"{found} (our engine for it has not run on a device yet)"
        present = Finding(area="library", name="tensorrt", status="ok", found=found)
        return (present, *examine_tensorrt(device))
    absent = Finding(
        area="library",
        name="tensorrt",
        status="optional",
        found="absent",
        remedy="on a Jetson: JetPack 6.1 or newer, and a venv with --system-site-packages",
    )
    return (absent,)


def layer_name(pattern: str) -> str:
    """What the finding about one layer of a pattern, built with TensorRT, is called."""
    return f"one {pattern} layer"


def _builds(tensorrt: Sequence[Finding]) -> bool:
    """Whether TensorRT has just built a dense layer here, which runs weakly typed too."""
    dense = layer_name("dense")
    return any(f.name == dense and (f.status == "ok" or f.found == WEAKLY_TYPED) for f in tensorrt)


def _torch_pair() -> Finding:
    """torch and torchvision of different builds import, and then miss operators."""
    torch, vision = installed("torch"), installed("torchvision")
    found = f"torch {torch or 'absent'}, torchvision {vision or 'absent'}"
    if torch is None and vision is None:
        return Finding(
            area="library",
            name="torch pair",
            status="optional",
            found="absent",
            remedy="pip install 'lpvit-edge[prune]' to prune on this machine",
        )
    if reason := pair_problem(torch, vision, wanted=_torch_that_vision_wants()):
        return Finding(
            area="library",
            name="torch pair",
            status="unfit",
            found=f"{found}: {reason}",
            remedy="install both in one command from one source: pip install -c constraints.txt "
            "torch torchvision; on Jetson take both from NVIDIA's index for your JetPack",
        )
    return Finding(area="library", name="torch pair", status="ok", found=found)


def _torch_that_vision_wants() -> str | None:
    """The exact torch that the installed torchvision was built for, by its own metadata."""
    try:
        needs = requires("torchvision") or []
    except PackageNotFoundError:
        return None
    pinned = (need.replace("(", "").replace(")", "").replace(" ", "") for need in needs)
    return next((p.removeprefix("torch==") for p in pinned if p.startswith("torch==")), None)


def pair_problem(torch: str | None, vision: str | None, *, wanted: str | None) -> str | None:
    """Why two versions do not belong together, None where they do.

    >>> pair_problem("2.13.0", "0.28.0+cpu", wanted="2.13.0")
    'one is a cpu build and the other a default build'
    """
    if torch is None or vision is None:
        return None if vision is None else "torchvision is useless without torch"
    (base, _, build), (_, _, vision_build) = torch.partition("+"), vision.partition("+")
    if wanted is not None and wanted.partition("+")[0] != base:
        return f"this torchvision was built for torch {wanted}"
    if build != vision_build:
        names = sorted((build or "default", vision_build or "default"))
        return f"one is a {names[0]} build and the other a {names[1]} build"
    return None


def _power(sources: Sequence[Detected]) -> Finding:
    usable = [s for s in sources if s.usable and s.info and s.info.quality != "estimated"]
    if usable:
        return Finding(
            area="power", name="sensor", status="ok", found=f"{usable[0].name}: {usable[0].reason}"
        )
    return Finding(
        area="power",
        name="sensor",
        status="warning",
        found="unavailable",
        remedy="latency is still measured; energy stays unknown, see the reasons below",
    )
