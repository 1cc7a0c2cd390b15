"""Which device and which engine a page is about, in the words that it shows."""

from pathlib import Path

from lpvit_edge.errors import FileFormatError


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
    from lpvit_edge import files
    from lpvit_edge.records import Manifest

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


def checked_energy_j(bundle: Path) -> tuple[float | None, str | None]:
    """Energy of one inference in J from the bundle's check, and why there is none."""
    from lpvit_edge import files
    from lpvit_edge.records import Check

    try:
        check = files.load(Check, bundle / "check.json")
    except FileFormatError as error:
        return None, f"no check of this engine: {error}"
    energy = check.sparse.energy
    if energy.per_image_mj is None:
        return None, energy.reason or "the check measured no energy"
    if energy.quality == "estimated":
        return None, "the check's energy is an estimate, not a measurement"
    return energy.per_image_mj / 1000, None
