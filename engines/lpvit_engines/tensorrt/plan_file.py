"""The serialized engine on disk, with the manifest that says what it was built from, where, and
what was proven about it.

    model.onnx  model.0123456789ab.plan  model.plan.json

A plan is named after its content, so that replacing the manifest is the whole swap: whoever reads
meanwhile, or after a power cut, finds the old pair or the new one.
"""

import glob
import hashlib
from pathlib import Path

import msgspec

from lpvit_edge.errors import DeviceMismatchError, FileFormatError
from lpvit_engines.cuda.calls import Calls
from lpvit_engines.tensorrt.atomic import write_atomic
from lpvit_engines.tensorrt.attention import AttentionCount
from lpvit_engines.tensorrt.inspector import EngineLayer
from lpvit_engines.tensorrt.sparsity import LayerProof, SparsityCount

KIND, FORMAT = "tensorrt-plan", 4
# 1 knew float16 alone, 2 no types of layers, 3 neither attention, clocks nor a comparison.
_READ_FORMATS = (1, 2, 3, FORMAT)
DEFAULT_PRECISION = "float16"


class DeviceKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a serialized engine is tied to. All Orins call themselves "Orin", so the number of
    multiprocessors and the memory tell a Nano from an AGX."""

    gpu: str
    compute_capability: str
    multiprocessors: int
    memory_gib: int
    tensorrt: str


class Compared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine's answers against those of another runtime, as shares of the largest one."""

    reference: str  # "torch" or "onnxruntime" or "openvino"
    inputs: int
    error: float  # the largest difference
    tolerance: float


class PlanManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Beside every plan."""

    kind: str
    format: int
    onnx_sha256: str
    plan_sha256: str
    device: DeviceKey
    cuda_driver: int  # 12060 is CUDA 12.6; recorded, not compared
    precision: str
    strongly_typed: bool
    sparsity: SparsityCount
    memory_skips: int
    proofs: tuple[LayerProof, ...] | None  # None: built without comparing layers
    layers: tuple[EngineLayer, ...]
    # Of int8 alone:
    ranges_sha256: str | None = None  # of the file that it was calibrated by
    int8_layers: tuple[str, ...] = ()
    half_layers: tuple[str, ...] = ()  # float16, because their block-sparse kernel is
    python_free: bool = False  # loads without this package; never claimed before format 2
    attention: AttentionCount | None = None  # None before format 4
    gpu_clocks: str = ""  # bounds at the build; empty for a card, and before format 4
    compared: Compared | None = None  # None: its answers were compared with nothing


def device_key(calls: Calls, device: int, *, tensorrt: str) -> DeviceKey:
    """This device and its TensorRT."""
    major, minor = calls.compute_capability(device)
    return DeviceKey(
        gpu=calls.device_name(device),
        compute_capability=f"{major}.{minor}",
        multiprocessors=calls.multiprocessors(device),
        memory_gib=round(calls.total_bytes(device) / 2**30),
        tensorrt=tensorrt,
    )


def plan_path(onnx: Path, plan_sha256: str, precision: str = DEFAULT_PRECISION) -> Path:
    return onnx.with_name(f"{_stem(onnx, precision)}.{plan_sha256[:12]}.plan")


def manifest_path(onnx: Path, precision: str = DEFAULT_PRECISION) -> Path:
    return onnx.with_name(f"{_stem(onnx, precision)}.plan.json")


def _stem(onnx: Path, precision: str) -> str:
    return onnx.stem if precision == DEFAULT_PRECISION else f"{onnx.stem}.{precision}"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write(onnx: Path, plan: bytes, manifest: PlanManifest) -> None:
    """Put a plan in the place of the one before, at once; that one is then removed."""
    precision = manifest.precision
    new = plan_path(onnx, manifest.plan_sha256, precision)
    write_atomic(new, plan)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    write_atomic(manifest_path(onnx, precision), text)
    for old in onnx.parent.glob(f"{glob.escape(_stem(onnx, precision))}.{'[0-9a-f]' * 12}.plan"):
        if old != new:
            old.unlink(missing_ok=True)


def discard(onnx: Path, precision: str = DEFAULT_PRECISION) -> None:
    """Remove what write() left, so that nobody takes a refused plan for a proven one."""
    manifest_path(onnx, precision).unlink(missing_ok=True)
    for plan in onnx.parent.glob(f"{glob.escape(_stem(onnx, precision))}.{'[0-9a-f]' * 12}.plan"):
        plan.unlink()


def read(
    onnx: Path,
    here: DeviceKey,
    *,
    precision: str = DEFAULT_PRECISION,
    ranges_sha256: str | None = None,
) -> tuple[bytes, PlanManifest] | None:
    """The plan of an ONNX file; None where there is none, or where the ONNX file or the ranges of
    int8 have changed.

    Raises DeviceMismatchError for a plan of another device or TensorRT, naming both sides, and
    FileFormatError where plan and manifest do not belong together.
    """
    beside = manifest_path(onnx, precision)
    if not beside.is_file():
        return None
    manifest = read_manifest(beside)
    path = plan_path(onnx, manifest.plan_sha256, precision)
    if manifest.onnx_sha256 != sha256(onnx.read_bytes()):
        return None
    if manifest.ranges_sha256 != ranges_sha256:
        return None
    try:
        plan = path.read_bytes()
    except FileNotFoundError:
        if not _was_swapped(beside, manifest):
            return None
        return read(onnx, here, precision=precision, ranges_sha256=ranges_sha256)
    refuse_other_device(manifest.device, here, path=path)
    if sha256(plan) != manifest.plan_sha256:
        raise FileFormatError(
            f"{path} is not the plan that {beside.name} describes; delete "
            "it and build again with lpvit build --engine tensorrt"
        )
    return plan, manifest


def _was_swapped(beside: Path, manifest: PlanManifest) -> bool:
    """Whether another process put a newer pair in place since the manifest was read."""
    return beside.is_file() and read_manifest(beside).plan_sha256 != manifest.plan_sha256


def read_manifest(path: Path) -> PlanManifest:
    """Raises FileFormatError for anything but a manifest of this format."""
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=PlanManifest)
    except msgspec.DecodeError as error:
        raise FileFormatError(f"{path}: {error}; build the engine again") from error
    if manifest.kind != KIND or manifest.format not in _READ_FORMATS:
        raise FileFormatError(
            f"{path}: {manifest.kind!r} of format {manifest.format}, this version reads {KIND!r}, "
            f"formats 1 to {FORMAT}; build the engine again"
        )
    return manifest


def refuse_other_device(built: DeviceKey, here: DeviceKey, *, path: Path) -> None:
    """Raise DeviceMismatchError with every difference: a plan runs where it was built."""
    different = [
        f"{field} is {getattr(built, field)} there and {getattr(here, field)} here"
        for field in DeviceKey.__struct_fields__
        if getattr(built, field) != getattr(here, field)
    ]
    if different:
        raise DeviceMismatchError(
            f"{path} was built for another device: {'; '.join(different)}. Build it "
            "again here from the ONNX file beside it: --rebuild"
        )
