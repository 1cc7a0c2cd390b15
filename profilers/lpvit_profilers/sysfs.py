"""Read small kernel files that may be absent, forbidden, empty or powered off."""

import os
from pathlib import Path

# A kernel attribute is at most one page; /proc/cpuinfo of a large machine is the exception.
_LIMIT = 4 << 20


def read_text(path: Path) -> str | None:
    """Text of a kernel file without the NULs and spaces around it, or None.

    The file is read with os.read: a sensor of a powered-off domain answers EAGAIN, on which
    Python's buffered reader raises TypeError instead of OSError.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read_all(handle).decode("utf-8", "replace").strip("\0 \n\t")
    except OSError:
        return None
    finally:
        os.close(handle)


def _read_all(handle: int) -> bytes:
    content = b""
    while len(content) < _LIMIT and (chunk := os.read(handle, 65536)):
        content += chunk
    return content


def to_int(text: str | None) -> int | None:
    """A decimal number, or None where the text is anything else."""
    if text is None:
        return None
    stripped = text.strip()
    digits = stripped.removeprefix("-")
    return int(stripped) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def read_int(path: Path) -> int | None:
    """A decimal number in a kernel file, or None."""
    return to_int(read_text(path))


def numbered(folder: Path, pattern: str) -> list[Path]:
    """Entries of a folder in the order of the numbers in their names (hwmon2 before hwmon10)."""

    def key(path: Path) -> tuple[int, str]:
        return int("".join(c for c in path.name if c in "0123456789") or "0"), path.name

    return sorted(folder.glob(pattern), key=key)
