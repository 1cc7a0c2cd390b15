"""Read and write the files that pass between stages.

A record is one JSON object: {"kind": "device-profile", "format": 1, ...its fields}. Reading is
strict, because a profile with a misspelt field must not become a silent default. Writing is
atomic, because factory devices lose power: a reader sees the old file or the whole new one.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lpvit_edge import distributed
from lpvit_edge.errors import FileFormatError
from lpvit_edge.records import Record

RecordT = TypeVar("RecordT", bound=Record)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a whole file or nothing. Raises OSError (a full disk) and leaves no half file."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    replace_atomic(path, write)


def replace_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place durably.

    Of several processes, which all come here, the first one writes and the others wait for it.
    """
    if distributed.is_main():
        _replace(path, write)
    distributed.wait()


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)  # makes the rename itself survive a power loss
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(record: Record, path: Path) -> None:
    """Write a record as indented JSON."""
    fields = {"kind": record.KIND, "format": record.FORMAT, **msgspec.to_builtins(record)}
    write_atomic(path, msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n")


def load(cls: type[RecordT], path: Path) -> RecordT:
    """Read a record, or raise FileFormatError naming the file and the field."""
    try:
        fields = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError as error:
        raise FileFormatError(
            f"{path}: no such file; it is the {cls.KIND} that an earlier step writes"
        ) from error
    except msgspec.DecodeError as error:
        raise FileFormatError(f"{path}: not JSON ({error}); make it again") from error
    return _convert(cls, fields, path)


def _convert(cls: type[RecordT], fields: Any, path: Path) -> RecordT:
    if not isinstance(fields, dict):
        raise FileFormatError(f"{path}: expected an object, got {type(fields).__name__}")
    kind, number = fields.pop("kind", None), fields.pop("format", None)
    if kind != cls.KIND:
        raise FileFormatError(f"{path}: this is a {kind!r} file, expected {cls.KIND!r}")
    if not isinstance(number, int) or not 1 <= number <= cls.FORMAT:
        reads = "format 1" if cls.FORMAT == 1 else f"formats 1 to {cls.FORMAT}"
        raise FileFormatError(
            f"{path}: format {number!r}, this version reads {reads}; make it again"
        )
    try:
        if number < cls.FORMAT:
            fields = cls.upgrade(fields, number)
        return msgspec.convert(fields, cls)
    except msgspec.ValidationError as error:
        raise FileFormatError(f"{path}: {error}") from error


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
