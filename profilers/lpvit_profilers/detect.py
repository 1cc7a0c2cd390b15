"""Which power sources this machine has, each with the reason where it has not."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from lpvit_edge.errors import EnvironmentUnfitError, MissingDependencyError, UnknownOptionError
from lpvit_profilers import tegra
from lpvit_profilers.base import (
    CONTAINING,
    PowerSample,
    PowerSource,
    Scope,
    SourceInfo,
    WorkingPart,
    opened,
)
from lpvit_profilers.estimate import EstimatedSource
from lpvit_profilers.jetson_sysfs import JetsonSysfsSource
from lpvit_profilers.nvml import NvmlSource
from lpvit_profilers.rapl import RaplSource
from lpvit_profilers.tegrastats_process import TegrastatsSource

_ESTIMATE = "estimate"
_COVERS: Mapping[Scope, str] = {
    "module_input": "the module's input",
    "board_input": "the board's input",
    "module": "the module's rails",
    "gpu_board": "the GPU board",
    "rail": "single rails",
    "cpu_package": "the CPU package",
}


class Detected(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One source that was tried. `reason` says why it is not usable, or what it covers."""

    name: str
    usable: bool
    reason: str
    info: SourceInfo | None = None
    first_sample: PowerSample | None = None


class _Candidate(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    make: Callable[[], PowerSource]
    refusal: str | None = None  # why it is not even tried here


def detect(root: Path = Path("/"), *, tdp_w: float | None = None) -> tuple[Detected, ...]:
    """Try every source once, best first. The first usable one is the default.

    The estimate is tried only with a stated `tdp_w`, and never counts as a default.
    """
    return tuple(_try(candidate) for candidate in _candidates(root, tdp_w))


def default_source(
    root: Path = Path("/"), *, working: WorkingPart | None = None
) -> PowerSource | None:
    """The best source that measures here, not open yet; None where there is none.

    Where the part that works is named, its total contains that part: the board of an idle GPU
    would give a steady, plausible and wrong power for work of the processor.
    """
    for candidate in _candidates(root, None):
        found = _try(candidate)
        if _fits(found, working):
            return candidate.make()
    return None


def source_named(name: str, root: Path = Path("/")) -> PowerSource:
    """One sensor of those that detect() tries, not open yet; the estimate is none.

    Raises UnknownOptionError for another name and EnvironmentUnfitError where it does not measure.
    """
    known = {c.name: c for c in _candidates(root, None) if c.name != _ESTIMATE}
    if name not in known:
        raise UnknownOptionError(
            f"no sensor is called {name!r}; there are {', '.join(known)}. The estimate is a model: "
            "where no sensor measures, --tdp-w alone asks for it"
        )
    found = _try(known[name])
    if not found.usable:
        raise EnvironmentUnfitError(f"{name} cannot be read here: {found.reason}")
    return known[name].make()


def covers(found: Detected, working: WorkingPart | None) -> bool:
    """Whether the source's total contains the part of the machine that works."""
    if working is None or found.info is None:
        return True
    return found.info.scope in CONTAINING[working]


def why_none(found: Sequence[Detected], *, working: WorkingPart | None = None) -> str:
    """One sentence for a report: why there is no power on this machine, or not of this part.

    The estimate is of a processor, and so not spoken of where the work is on the GPU.
    """
    reasons = [
        f"{d.name}: {_why_not(d, working)}"
        for d in found
        if not _fits(d, working) and not (d.name == _ESTIMATE and working == "gpu")
    ]
    return "; ".join(reasons)


def no_sensor(working: WorkingPart | None) -> str:
    """How a sentence begins that says that nothing can be read here, or nothing of this part."""
    covering = "" if working is None else f" that covers the {working.upper()}"
    return f"no power sensor{covering} can be read here"


def _fits(found: Detected, working: WorkingPart | None) -> bool:
    return found.usable and covers(found, working)


def _why_not(found: Detected, working: WorkingPart | None) -> str:
    if not found.usable or working is None or found.info is None:
        return found.reason
    return f"it measures {_COVERS[found.info.scope]} only"


def _candidates(root: Path, tdp_w: float | None) -> tuple[_Candidate, ...]:
    is_tegra = tegra.is_tegra(root)
    no_jetson = None if is_tegra else "this is not a Jetson"
    mute = (
        f"on {tegra.soc(root)} NVML tells nothing but the GPU's name"
        if tegra.nvml_is_mute(root)
        else None
    )
    no_estimate = (
        "off; it is a model and not a measurement, state --tdp-w to see it"
        if tdp_w is None
        else None
    )
    return (
        _Candidate(name="jetson-sysfs", make=lambda: JetsonSysfsSource(root)),
        _Candidate(name="tegrastats", make=TegrastatsSource, refusal=no_jetson),
        _Candidate(name="nvml", make=NvmlSource, refusal=mute),
        _Candidate(name="rapl", make=lambda: RaplSource(root)),
        _Candidate(
            name=_ESTIMATE, make=lambda: EstimatedSource(tdp_w=tdp_w or 0.0), refusal=no_estimate
        ),
    )


def _try(candidate: _Candidate) -> Detected:
    if candidate.refusal is not None:
        return Detected(name=candidate.name, usable=False, reason=candidate.refusal)
    try:
        with opened(candidate.make()) as source:
            if source.info.has_counter:
                source.sample()  # power made from a counter needs two samples and some time
                time.sleep(max(0.02, 2 * source.info.period_s))
            return _verdict(candidate.name, source.info, source.sample())
    except (EnvironmentUnfitError, MissingDependencyError) as error:
        return Detected(name=candidate.name, usable=False, reason=str(error))


def _verdict(name: str, info: SourceInfo, sample: PowerSample) -> Detected:
    if sample.total_mw is None:
        reason = f"it opens but gives no total: {sample.reason}"
    elif sample.total_mw == 0.0:
        reason = "it reads exactly 0 mW, which no running machine draws"
    elif sample.quality == "suspect":
        reason = f"its readings contradict each other: {sample.reason}"
    else:
        reason = f"{info.total_rule}, {info.scope}, {info.quality}"
    usable = bool(sample.total_mw) and sample.quality != "suspect"
    return Detected(name=name, usable=usable, reason=reason, info=info, first_sample=sample)
