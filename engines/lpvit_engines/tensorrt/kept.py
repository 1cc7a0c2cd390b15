"""A plan that was built, in memory or beside its ONNX file."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpvit_edge.errors import DeviceMismatchError, FileFormatError
from lpvit_engines.tensorrt import ahead_of_time, plan_file
from lpvit_engines.tensorrt.device import OpenDevice
from lpvit_engines.tensorrt.library import load_tensorrt, version_of
from lpvit_engines.tensorrt.plan_file import PlanManifest
from lpvit_engines.tensorrt.ranges import read_ranges
from lpvit_engines.tensorrt.sparsity import is_plugin

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MadePlan:
    """A plan that is in memory only."""

    plan: bytes
    manifest: PlanManifest


def kept_plan(onnx_path: Path, device: OpenDevice, *, precision: str) -> MadePlan | None:
    """The plan beside an ONNX file; None where there is none of this very file and calibration.

    Raises DeviceMismatchError for one of another device, FileFormatError for a damaged one.
    """
    version = str(load_tensorrt().__version__)
    here = plan_file.device_key(device.calls, device.device, tensorrt=version)
    calibration = read_ranges(onnx_path)[1] if precision == "int8" else None
    found = plan_file.read(onnx_path, here, precision=precision, ranges_sha256=calibration)
    return None if found is None else MadePlan(plan=found[0], manifest=found[1])


def keeps_kernels(onnx_path: Path, *, precision: str, trt: Any) -> bool:
    """Whether the plan that is to be replaced has its block-sparse kernels in it, as the new one
    then must; a TensorRT that cannot is told of, and gets the form that calls Python."""
    beside = plan_file.manifest_path(onnx_path, precision)
    try:
        manifest = plan_file.read_manifest(beside) if beside.is_file() else None
    except FileFormatError:
        return False
    if manifest is None or not manifest.python_free or not _runs_blocks(manifest):
        return False
    if version_of(trt) < ahead_of_time.OLDEST:
        _LOG.warning(
            "the plan before loaded without Python; TensorRT %s cannot make such a one, and the "
            "new one calls Python",
            trt.__version__,
        )
        return False
    return True


def _runs_blocks(manifest: PlanManifest) -> bool:
    kept = (x.kept and x.pattern != "2:4" for x in manifest.proofs or ())
    return any(kept) or any(is_plugin(layer) for layer in manifest.layers)


def proven_plan(
    onnx_path: Path, device: OpenDevice, *, precision: str, python_free: bool
) -> MadePlan | None:
    """The plan beside an ONNX file, if its layers were compared on this device.

    With `python_free` one that calls Python does not count.
    """
    try:
        kept = kept_plan(onnx_path, device, precision=precision)
    except (DeviceMismatchError, FileFormatError):
        return None
    if kept is None or kept.manifest.proofs is None:
        return None
    return None if python_free and not kept.manifest.python_free else kept
