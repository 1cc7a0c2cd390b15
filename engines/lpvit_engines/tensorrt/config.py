"""Settings of a build, and the timing cache that makes the next one shorter."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.log import Log

# TensorRT may take this share of the memory that is free: on a Jetson the rest of the system lives
# in the same memory, and kernels that do not fit are skipped silently.
_WORKSPACE_SHARE = 0.5


def make_config(
    trt: Any, builder: Any, *, sparse_weights: bool, half_flag: bool, free_bytes: int
) -> Any:
    """The builder config. `half_flag` is for weakly typed networks, on TensorRT 10 only."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(free_bytes * _WORKSPACE_SHARE))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if half_flag:
        config.set_flag(getattr(trt.BuilderFlag, "FP16"))  # noqa: B009  absent from TensorRT 11
    return config


def timing_cache_path(folder: Path, *, version: str, device: str) -> Path:
    """One file per TensorRT version and device: timings of another are worse than none."""
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}-{device}").strip("-").lower()
    return folder / f"timing-{key}.cache"


def cache_folder() -> Path:
    """Where timing caches live: $XDG_CACHE_HOME/lpvit-edge or ~/.cache/lpvit-edge."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lpvit-edge"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Only one process reads or writes the cache at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def attach_timing_cache(config: Any, path: Path, log: Log) -> None:
    """Give the build the timings of earlier ones, or an empty cache to fill."""
    with _locked(path):
        content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise log.failure(
            f"TensorRT refused the timing cache {path}", "delete that file and build again"
        )


def save_timing_cache(config: Any, path: Path) -> None:
    """Put the timings of this build beside those that another process saved meanwhile."""
    cache = config.get_timing_cache()
    if cache is None:
        raise EngineError("TensorRT gave no timing cache after the build; build it again")
    with _locked(path):
        if path.is_file():
            cache.combine(config.create_timing_cache(path.read_bytes()), ignore_mismatch=False)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            with temporary.open("wb") as handle:
                handle.write(cache.serialize())
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
