"""Files that are there whole or not at all, whatever ends the process or the power."""

import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: Any) -> None:
    """Write bytes, or a buffer as TensorRT gives it, beside `path` and rename. Raises OSError."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
