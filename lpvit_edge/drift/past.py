"""What a line has shown so far, kept over restarts: rare changes are only known by a long past."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lpvit_edge import files
from lpvit_edge.deps import require
from lpvit_edge.errors import FileFormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Past = Mapping[str, "NDArray[np.int64]"]  # see DriftWatch.past
_KEPT = 4  # files: one for each reference, so that a bundle that comes back has its own
_LEAST, _SHARE = 1000, 0.1  # frames by which the past has grown before it is written again


def is_due(frames: int, written: int) -> bool:
    """Whether the past of so many frames is to be written: ever less often, as it grows."""
    return frames - written >= max(_LEAST, _SHARE * written)


def save_past(past: Past, path: Path) -> None:
    """Write it, and remove those of references that were in use longest ago. Raises OSError."""
    arrays = {name: np.ascontiguousarray(values) for name, values in past.items()}
    files.write_atomic(path, require("safetensors.numpy").save(arrays))
    by_age = sorted(path.parent.glob("past-*.safetensors"), key=lambda file: file.stat().st_mtime)
    for old in by_age[:-_KEPT]:
        old.unlink(missing_ok=True)


def load_past(path: Path, *, like: Past) -> Past | None:
    """What save_past wrote; None before the first time.

    Raises FileFormatError for a file that is damaged or has other shapes than `like`.
    """
    error_of: type[Exception] = require("safetensors").SafetensorError
    try:
        found: Past = require("safetensors.numpy").load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, error_of) as error:
        raise FileFormatError(f"{path}: cannot be read ({error}); remove it") from error
    shapes = {name: (values.shape, values.dtype) for name, values in found.items()}
    expected = {name: (values.shape, values.dtype) for name, values in like.items()}
    if shapes != expected or any((values < 0).any() for values in found.values()):
        raise FileFormatError(f"{path}: not the past of a line with this reference; remove it")
    return found
