"""The bundles of a device: the one that runs, the one before it, and the dense one to fall back on.

    store.json          which folder is `current`, `previous` and `dense`; replaced as a whole
    bundles/DIGITS/     bundles, named by the first digits of their seal's SHA-256
    incoming/           where a bundle is copied and proven; an interrupted copy has no effect
    lock, install.lock  held while store.json changes; while a bundle is copied and proven
    starts.json         starts without a verdict, see lpvit_edge.crash_loop

Nothing points at a bundle before its engine has answered the golden frames on this device, and one
rename switches, so that a power loss leaves the old bundles or the new ones.
"""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

import msgspec

from lpvit_edge import files
from lpvit_edge.bundle import REFERENCE, SEALED, SEALED_TOO, Bundle, open_bundle
from lpvit_edge.errors import EnvironmentUnfitError, FileFormatError
from lpvit_edge.records import Record

Role = Literal["current", "previous", "dense"]
# A TensorRT plan beside the model spares minutes; check.json is what the page shows of the energy.
_PLANS = ("model.plan.json", "model.int8.plan.json")
_BESIDE = ("bundle.json", *SEALED, *SEALED_TOO, *REFERENCE, *_PLANS, "check.json")


class StoreRecord(Record, frozen=True, kw_only=True):
    """store.json: names of folders under bundles/. `left` says why a bundle was left."""

    KIND: ClassVar[str] = "bundle-store"

    current: str | None = None
    previous: str | None = None
    dense: str | None = None
    on_dense: str | None = None  # why the dense bundle runs in the place of `current`
    left: dict[str, str] = msgspec.field(default_factory=dict)


class BundleStore:
    """A folder of bundles. Several processes may use it: changes are made under a lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def record(self) -> StoreRecord:
        """What store.json says; an empty record before the first installation."""
        path = self.folder / "store.json"
        return files.load(StoreRecord, path) if path.exists() else StoreRecord()

    def path(self, role: Role) -> Path | None:
        """The folder of a bundle, None where there is none."""
        name = getattr(self.record(), role)
        return None if name is None else self._folder_of(name)

    def open(self, role: Role) -> Bundle:
        """The bundle, held against its seal. Raises FileFormatError where there is none."""
        path = self.path(role)
        if path is None:
            raise FileFormatError(
                f"{self.folder}: no {role} bundle; give it one with `lpvit install BUNDLE --store "
                f"{self.folder}`" + (" --dense" if role == "dense" else "")
            )
        return open_bundle(path)

    def install(
        self, source: Path, prove: Callable[[Bundle], object], *, role: Role = "current"
    ) -> Bundle:
        """Copy a bundle, prove the copy, and switch to it; the one before becomes `previous`.

        `prove` raises where the bundle must not run here; nothing is switched then. Installing
        what is current already changes nothing.
        """
        open_bundle(source)
        with self._locked("install.lock"):  # proving takes minutes: a line must not wait for it
            name = _name_of(source)
            if not self._folder_of(name).is_dir():
                self._copy(source, name, prove)
            else:
                prove(open_bundle(self._folder_of(name)))
            with self._locked():
                self._point(name, role)
        return open_bundle(self._folder_of(name))

    def go_back(self, name: str, reason: str) -> bool:
        """Make `previous` the current bundle in place of `name`; `reason` is kept.

        False where there is none, or where another bundle has become current meanwhile.
        """
        with self._locked():
            record = self.record()
            if record.previous is None or record.current != name:
                return False
            left = {**record.left, record.current: reason[:500]}
            self._save(
                msgspec.structs.replace(record, current=record.previous, previous=None, left=left)
            )
        return True

    def note_dense(self, name: str, reason: str) -> bool:
        """The dense bundle runs in the place of `name` until one is installed, after a restart too.

        False where another bundle has become current meanwhile: that one is to run.
        """
        with self._locked():
            record = self.record()
            if record.current != name:
                return False
            self._save(msgspec.structs.replace(record, on_dense=reason[:500]))
        return True

    def leave_dense(self, reason: str) -> None:
        """Make `current` the bundle to run again in place of the dense one; `reason` is kept."""
        with self._locked():
            record = self.record()
            left = {**record.left, **({record.dense: reason[:500]} if record.dense else {})}
            self._save(msgspec.structs.replace(record, on_dense=None, left=left))

    def _copy(self, source: Path, name: str, prove: Callable[[Bundle], object]) -> None:
        incoming = self.folder / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir(parents=True)
        try:
            _copy_files(source, incoming)
            prove(open_bundle(incoming))  # may leave a plan of its own beside the model
            for path in (*incoming.iterdir(), incoming):
                files.sync(path)
            target = self._folder_of(name)
            target.parent.mkdir(exist_ok=True)
            incoming.rename(target)
            files.sync(target.parent)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _point(self, name: str, role: Role) -> None:
        record = self.record()
        left = {key: value for key, value in record.left.items() if key != name}
        record = msgspec.structs.replace(record, left=left)
        if role == "current":
            previous = record.previous if record.current in (None, name) else record.current
            record = msgspec.structs.replace(record, previous=previous, on_dense=None)
        self._save(msgspec.structs.replace(record, **{role: name}))
        self._remove_others()

    def _remove_others(self) -> None:
        record = self.record()
        kept = {record.current, record.previous, record.dense}
        for path in (self.folder / "bundles").iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _save(self, record: StoreRecord) -> None:
        files.save(record, self.folder / "store.json")

    def _folder_of(self, name: str) -> Path:
        if not name.isalnum():
            raise FileFormatError(f"{self.folder / 'store.json'}: {name!r} is no bundle's name")
        return self.folder / "bundles" / name

    @contextmanager
    def _locked(self, file: str = "lock") -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _copy_files(source: Path, target: Path) -> None:
    plans = (path.name for path in source.glob("model.*.plan"))
    for file in (*_BESIDE, *plans):
        if (source / file).is_file():
            try:
                shutil.copyfile(source / file, target / file)
            except OSError as error:  # a full disk, or a file that another user may not read
                raise EnvironmentUnfitError(
                    f"{source / file} cannot be copied to {target} ({error.strerror}); nothing was "
                    "installed"
                ) from error


def _name_of(bundle: Path) -> str:
    """Digits that differ where the seal or the drift reference does."""
    digest = hashlib.sha256()
    for file in ("bundle.json", "reference.json"):
        if (bundle / file).is_file():
            digest.update((bundle / file).read_bytes())
    return digest.hexdigest()[:12]
