"""The document that `lpvit optimize` prints with --json and leaves as optimize.json."""

from pathlib import Path
from typing import Annotated, Any

import msgspec

from lpvit_edge.confidence import wilson
from lpvit_edge.errors import FileFormatError
from lpvit_edge.recipe import FinetuneLog
from lpvit_edge.records import (
    Allocation,
    Check,
    Choice,
    DeviceProfile,
    EngineCheck,
    ExportLog,
    ModelIdentity,
)
from lpvit_edge.targets import Target

SCHEMA = "lpvit.optimize/1"


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One budget: latency as predicted, accuracy by torch on `images` held-out images."""

    target: float  # share of the dense latency
    predicted_latency_ms: float
    accuracy: float | None
    images: int


def document(
    profile: DeviceProfile,
    allocation: Allocation,
    export: ExportLog,
    check: Check,
    *,
    precision: str,
    targets: tuple[Target, ...],
    curve: tuple[CurvePoint, ...],
    report: str,
    floor: dict[str, Any] | None = None,
    finetuned: FinetuneLog | None = None,
) -> dict[str, Any]:
    """One JSON document; accuracy and drop are fractions, missing numbers None with a reason."""
    measured = check.sparse.latency.median_ms
    latency = [target for target in targets if target.quantity == "latency_ms"]
    return {
        "schema": SCHEMA,
        "model": msgspec.to_builtins(profile.model),
        "engine": f"{profile.engine} {profile.engine_version}",
        "threads": profile.threads,
        "precision": precision,
        "batch": profile.batch,
        "dense": _side(check.dense),
        "sparse": _side(check.sparse),
        "speedup": check.speedup,
        "target": next((t.asked for t in latency), None),
        "target_latency_ms": next((t.limit for t in latency), None),
        "target_met": all(target.met is not False for target in targets),
        "targets": msgspec.to_builtins(targets),
        "accuracy_floor": floor,
        "rotated": allocation.basis_sha256 is not None,
        "finetuned": None
        if finetuned is None
        else {"epochs": finetuned.recipe.epochs, "images": finetuned.images},
        "predicted_latency_ms": check.predicted_latency_ms,
        "prediction_error": check.predicted_latency_ms / measured - 1.0,
        "accuracy_drop": check.accuracy_drop,
        "agreement": check.agreement,
        "accuracy_curve": msgspec.to_builtins(curve),
        "layers": msgspec.to_builtins(allocation.choices),
        "sum_of_parts_over_measured_dense": profile.sum_over_measured,
        "profile_reasons": [*profile.reasons, *_other_precision(profile, precision)],
        "onnxruntime_relative_error": export.onnxruntime_error,
        "engine_relative_error": export.engine_error,
        "skipped_images": list(check.skipped),
        "device": profile.device,
        "fingerprint": profile.fingerprint,
        "report": report,
    }


def _other_precision(profile: DeviceProfile, precision: str) -> list[str]:
    if precision == profile.precision:
        return []
    return [f"it was measured in {profile.precision}, and the engines ran in {precision}"]


_Positive = Annotated[float, msgspec.Meta(gt=0.0)]


class _Side(msgspec.Struct, frozen=True, kw_only=True):
    latency_ms: _Positive
    latency_p99_ms: _Positive
    latency_spread_ms: float
    latency_stable: bool
    latency_reasons: tuple[str, ...]
    throughput_per_s: _Positive
    accuracy: float | None
    accuracy_ci95: tuple[float | None, float | None]
    images: int
    weight_bytes: int
    energy_per_image_mj: float | None
    energy_ci95_mj: float | None
    energy_source: str | None
    energy_scope: str | None
    energy_quality: str
    energy_reason: str | None
    mean_power_mw: float | None


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    """The keys that the table and the report read; a document may hold more."""

    model: ModelIdentity
    engine: str
    threads: int
    precision: str
    batch: int
    dense: _Side
    sparse: _Side
    speedup: _Positive
    target: str | None
    target_latency_ms: _Positive | None
    target_met: bool
    targets: tuple[Target, ...]
    accuracy_floor: dict[str, Any] | None
    rotated: bool
    finetuned: dict[str, Any] | None
    predicted_latency_ms: float
    prediction_error: float
    accuracy_drop: float | None
    agreement: float
    accuracy_curve: tuple[CurvePoint, ...]
    layers: Annotated[tuple[Choice, ...], msgspec.Meta(min_length=1)]
    sum_of_parts_over_measured_dense: float
    profile_reasons: tuple[str, ...]
    onnxruntime_relative_error: float
    engine_relative_error: float
    skipped_images: tuple[str, ...]
    device: dict[str, Any]
    fingerprint: str
    report: str


def load_document(path: Path) -> dict[str, Any]:
    """Read optimize.json. Raises FileFormatError, naming the key, when it is no such document."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise FileFormatError(f"{path}: not an optimize.json ({error})") from error
    if content.get("schema") != SCHEMA:
        raise FileFormatError(
            f"{path}: schema {content.get('schema')!r}, this version reads {SCHEMA}"
        )
    try:
        msgspec.convert(content, _Document)
    except msgspec.ValidationError as error:
        raise FileFormatError(
            f"{path}: {error}; it is cut or of an older version; write it anew with "
            "lpvit optimize --resume"
        ) from error
    return content


def _side(side: EngineCheck) -> dict[str, Any]:
    low, high = wilson(side.correct, side.images) if side.correct is not None else (None, None)
    return {
        "latency_ms": side.latency.median_ms,
        "latency_p99_ms": side.latency.p99_ms,
        "latency_spread_ms": side.latency.spread_ms,
        "latency_stable": side.latency.stable,
        "latency_reasons": list(side.latency.reasons),
        "throughput_per_s": side.throughput_per_s,
        "accuracy": side.accuracy,
        "accuracy_ci95": [low, high],
        "images": side.images,
        "weight_bytes": side.weight_bytes,
        "energy_per_image_mj": side.energy.per_image_mj,
        "energy_ci95_mj": side.energy.ci95_mj,
        "energy_source": side.energy.source,
        "energy_scope": side.energy.scope,
        "energy_quality": side.energy.quality,
        "energy_reason": side.energy.reason,
        "mean_power_mw": side.energy.mean_power_mw,
    }
