"""Which device and which engine a page is about, in the words that it shows."""

from pathlib import Path

import msgspec

from lpvit_edge import files
from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import FileFormatError
from lpvit_edge.records import Check, Manifest


def device_identity(root: Path = Path("/")) -> dict[str, str]:
    """What is known of this device, by name; what is not known is absent."""
    from lpvit_profilers.device import fingerprint, identify

    found = identify(root=root)
    mode = found.power_mode
    facts = {
        "board": found.board_model,
        "soc": found.soc,
        "jetpack": found.jetpack,
        "cpu": found.cpu_model,
        "cores": None if found.logical_cores is None else str(found.logical_cores),
        "gpu": ", ".join(found.gpus) or None,
        "os": found.os,
        "kernel": found.kernel,
        "power mode": None if mode is None else f"{mode.name} (id {mode.id})",
        "fingerprint": fingerprint(found),
    }
    return {name: value[:500] for name, value in facts.items() if value}


def engine_identity(bundle: Path) -> dict[str, str] | None:
    """What manifest.json says of a bundle's engine; None where there is no manifest."""
    if not (bundle / "manifest.json").is_file():
        return None
    manifest = files.load(Manifest, bundle / "manifest.json")
    sparse = sum("block" in kernel for kernel in manifest.kernels.values())
    return {
        "engine": f"{manifest.engine} {manifest.engine_version}",
        "precision": manifest.precision,
        "threads": str(manifest.threads),
        "model": manifest.onnx_sha256[:12],
        "sparse layers": str(sparse),
        "built on": manifest.fingerprint,
    }


class CheckedEnergy(msgspec.Struct, frozen=True, kw_only=True):
    """What `check` measured of one inference on this device, or why there is nothing.

    `gross_j` holds what the device draws anyway during `latency_s`. `scope` is what was measured.
    """

    gross_j: float | None = None
    latency_s: float | None = None
    scope: str | None = None
    reason: str | None = None


def checked_energy(bundle: Bundle) -> CheckedEnergy:
    """From the bundle's check.json; one of another model, or an estimate, is none."""
    try:
        check = files.load(Check, bundle.path("check.json"))
    except (FileFormatError, OSError) as error:
        return CheckedEnergy(reason=f"no check of this engine: {error}"[:500])
    if check.onnx_sha256 != bundle.manifest.onnx_sha256:
        return CheckedEnergy(reason="the check is of another model; run `lpvit check`")
    energy = check.sparse.energy
    if energy.per_image_mj is None:
        return CheckedEnergy(reason=energy.reason or "the check measured no energy")
    if energy.quality == "estimated":
        return CheckedEnergy(reason="the check's energy is an estimate, not a measurement")
    return CheckedEnergy(
        gross_j=energy.per_image_mj / 1000,
        latency_s=check.sparse.latency.median_ms / 1000,
        scope=energy.scope,
    )
