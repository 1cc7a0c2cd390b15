"""One line only for each state folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lpvit_edge.errors import EnvironmentUnfitError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Refuse a second line in the same state folder with EnvironmentUnfitError."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise EnvironmentUnfitError(
            f"another line runs with the state folder {folder}; stop it, or choose another --state"
        ) from error
    finally:
        os.close(handle)
