"""The document that `lpvit optimize` prints with --json and leaves as optimize.json."""

import math
from pathlib import Path
from typing import Any

import msgspec

from lpvit_edge.errors import FileFormatError
from lpvit_edge.records import Allocation, Check, DeviceProfile, EngineCheck, ExportLog

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
    target_ms: float,
    curve: tuple[CurvePoint, ...],
    report: str,
) -> dict[str, Any]:
    """One JSON document; accuracy and drop are fractions, missing numbers None with a reason."""
    measured = check.sparse.latency.median_ms
    return {
        "schema": SCHEMA,
        "model": msgspec.to_builtins(profile.model),
        "engine": f"{profile.engine} {profile.engine_version}",
        "threads": profile.threads,
        "precision": profile.precision,
        "batch": profile.batch,
        "dense": _side(check.dense),
        "sparse": _side(check.sparse),
        "speedup": check.speedup,
        "target_latency_ms": target_ms,
        "target_met": target_met(check, profile, target_ms),
        "predicted_latency_ms": check.predicted_latency_ms,
        "prediction_error": check.predicted_latency_ms / measured - 1.0,
        "accuracy_drop": check.accuracy_drop,
        "agreement": check.agreement,
        "accuracy_curve": msgspec.to_builtins(curve),
        "layers": msgspec.to_builtins(allocation.choices),
        "sum_of_parts_over_measured_dense": profile.sum_over_measured,
        "profile_reasons": list(profile.reasons),
        "onnxruntime_relative_error": export.onnxruntime_error,
        "engine_relative_error": export.engine_error,
        "skipped_images": list(check.skipped),
        "device": profile.device,
        "fingerprint": profile.fingerprint,
        "report": report,
    }


# A run of the same engine differs by a few percent from one minute to the next.
TARGET_TOLERANCE = 0.05


def target_met(check: Check, profile: DeviceProfile, target_ms: float) -> bool:
    """Whether the sparse engine keeps the target, measured beside the dense one.

    The target was set against the profile's dense latency; the machine may run faster or slower
    now, so the ratio to the dense engine of the same run is what counts.
    """
    share = check.sparse.latency.median_ms / check.dense.latency.median_ms
    return share <= target_ms / profile.dense.median_ms * (1.0 + TARGET_TOLERANCE)


def load_document(path: Path) -> dict[str, Any]:
    """Read optimize.json. Raises FileFormatError when it is no such document."""
    try:
        content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, msgspec.DecodeError) as error:
        raise FileFormatError(f"{path}: not an optimize.json ({error})") from error
    if content.get("schema") != SCHEMA:
        raise FileFormatError(
            f"{path}: schema {content.get('schema')!r}, this version reads {SCHEMA}"
        )
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
        "energy_quality": side.energy.quality,
        "energy_reason": side.energy.reason,
    }


def wilson(correct: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); z for 95 %."""
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - half) / scale, (centre + half) / scale
