"""The bundle: what `build` leaves and `run` needs, sealed with the SHA-256 of every file.

    bundle.json     this record: labels, preprocessing, device, and the seal
    model.onnx      the network, compiled on the device when it is loaded
    manifest.json   what compiled it, where, and which kernels ran
    golden.zip      a few images with the answers that they gave
    model.int8.json   how large the inputs of linear layers get, for TensorRT's int8
    reference.json, reference.safetensors   what the embedding looks like; written by `check`

Nothing in a bundle is ever unpickled.
"""

from pathlib import Path
from typing import Any, ClassVar

import msgspec

from lpvit_edge import files
from lpvit_edge.errors import DeviceMismatchError, FileFormatError, MismatchError
from lpvit_edge.golden import GoldenFrame, pack
from lpvit_edge.images import Preprocess
from lpvit_edge.records import Manifest, ModelIdentity, Record

SEALED = ("model.onnx", "manifest.json", "golden.zip")
SEALED_TOO = ("model.int8.json",)  # where TensorRT's int8 was calibrated
REFERENCE = ("reference.json", "reference.safetensors")  # has a seal of its own


class BundleRecord(Record, frozen=True, kw_only=True):
    """bundle.json."""

    KIND: ClassVar[str] = "bundle"

    model: ModelIdentity
    preprocess: Preprocess
    device: dict[str, Any]  # of the build, see lpvit_profilers.device.DeviceIdentity
    sha256: dict[str, str]  # by file


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle whose files are what they were when it was built."""

    folder: Path
    record: BundleRecord
    manifest: Manifest
    rebuild: bool = False  # an engine that was compiled on another device is compiled again here

    def path(self, name: str) -> Path:
        """A file of the bundle."""
        return self.folder / name

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the model's outputs."""
        return self.manifest.labels

    @property
    def version(self) -> str:
        """First twelve digits of model.onnx's SHA-256."""
        return self.manifest.onnx_sha256[:12]


def write_bundle(
    folder: Path,
    *,
    model: ModelIdentity,
    preprocess: Preprocess,
    golden: tuple[tuple[GoldenFrame, bytes], ...],
) -> BundleRecord:
    """Seal the folder that holds model.onnx and manifest.json; writes golden.zip, bundle.json."""
    from lpvit_profilers.device import identify

    files.write_atomic(folder / "golden.zip", pack(golden))
    record = BundleRecord(
        model=model,
        preprocess=preprocess,
        device=msgspec.to_builtins(identify()),
        sha256={name: files.sha256_of(folder / name) for name in _sealed(folder)},
    )
    files.save(record, folder / "bundle.json")
    return record


def _sealed(folder: Path) -> tuple[str, ...]:
    return (*SEALED, *(name for name in SEALED_TOO if (folder / name).is_file()))


def open_bundle(folder: Path) -> Bundle:
    """Read a bundle and hold every file against the seal.

    Raises FileFormatError for a missing or malformed file and for labels that are missing,
    MismatchError for a file that changed since it was sealed.
    """
    record = files.load(BundleRecord, folder / "bundle.json")
    missing = [name for name in SEALED if name not in record.sha256]
    if missing:
        raise FileFormatError(f"{folder / 'bundle.json'}: no hash of {', '.join(missing)}")
    for name in (*SEALED, *(name for name in SEALED_TOO if name in record.sha256)):
        _refuse_changed(folder / name, record.sha256[name])
    manifest = files.load(Manifest, folder / "manifest.json")
    if not manifest.labels:
        raise FileFormatError(
            f"{folder}: the model's classes have no names; set `labels` in the model's TOML file "
            "and run `lpvit build` again"
        )
    return Bundle(folder=folder, record=record, manifest=manifest)


def _refuse_changed(path: Path, expected: str) -> None:
    if not path.is_file():
        raise FileFormatError(f"{path}: no such file; copy the whole bundle, or build it again")
    found = files.sha256_of(path)
    if found != expected:
        raise MismatchError(
            f"{path}: its content changed since the bundle was built (SHA-256 {found[:12]} instead "
            f"of {expected[:12]}); copy the bundle again, or run `lpvit build`"
        )


def refuse_other_device(bundle: Bundle) -> None:
    """Raise DeviceMismatchError, naming the differences, where this is not the bundle's device."""
    from lpvit_profilers.device import DeviceIdentity, differences, fingerprint, identify

    here = identify()
    if fingerprint(here) == bundle.manifest.fingerprint:
        return
    try:
        there = msgspec.convert(bundle.record.device, DeviceIdentity)
    except msgspec.ValidationError as error:
        raise FileFormatError(f"{bundle.folder / 'bundle.json'}: device: {error}") from error
    named = "; ".join(differences(there, here)) or "its fingerprint differs"
    raise DeviceMismatchError(
        f"{bundle.folder} was built and measured on another device: {named}. Build it here "
        "(`lpvit build`), or pass --other-device to run it with figures that were not measured here"
    )
