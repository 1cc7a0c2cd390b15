"""Settings of a build, and the timing cache that makes the next one shorter."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lpvit_engines.tensorrt.atomic import write_atomic
from lpvit_engines.tensorrt.log import Log

_LOG = logging.getLogger(__name__)
_DEVFREQ = Path("/sys/class/devfreq")
# TensorRT may take this share of the memory that is free: on a Jetson the rest of the system lives
# in the same memory, and kernels that do not fit are skipped silently.
_WORKSPACE_SHARE = 0.5


def set_up(
    trt: Any, config: Any, *, sparse_weights: bool, half_flag: bool, free_bytes: int
) -> None:
    """Set a builder config. `half_flag` is for weakly typed networks, on TensorRT 10 only."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(free_bytes * _WORKSPACE_SHARE))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if sparse_weights:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if half_flag:
        config.set_flag(getattr(trt.BuilderFlag, "FP16"))  # noqa: B009  absent from TensorRT 11


def timing_cache_path(folder: Path, *, version: str, device: str, clocks: str = "") -> Path:
    """One file per TensorRT version, device and clocks: timings of others are worse than none."""
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{version}-{device}-{clocks}").strip("-").lower()
    return folder / f"timing-{key}.cache"


def gpu_clocks(devfreq: Path = _DEVFREQ) -> str:
    """The bounds of an integrated GPU's clocks, such as "306-918 MHz": the power mode sets them,
    and jetson_clocks makes both the same. Empty where the kernel has none, as for a card.
    """
    found = []
    for device in sorted(devfreq.glob("*gpu*")):
        hz = [_integer(device / name) for name in ("min_freq", "max_freq")]
        found.append("-".join("?" if x is None else f"{x / 1e6:.0f}" for x in hz) + " MHz")
    return ", ".join(found)


def _integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


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
    cache = config.create_timing_cache(_earlier(path))
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise log.failure(
            f"TensorRT refused the timing cache {path}", "delete that file and build again"
        )


def _earlier(path: Path) -> bytes:
    """The timings on disk; none, said, where the folder can be neither made nor read."""
    try:
        with _locked(path):
            return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        _LOG.warning("builds without the timings of earlier builds, which takes longer: %s", error)
        return b""


def save_timing_cache(config: Any, path: Path, log: Log) -> None:
    """Put the timings of this build beside those that another process saved meanwhile.

    The engine is whole by then and only the next build would be shorter: what TensorRT refuses
    here, in its own words, or a full disk is a warning.
    """
    try:
        with _locked(path):
            _save(config, path, log)
    except OSError as error:
        _LOG.warning(
            "the timings of this build are not kept: %s; the next will take as long", error
        )


def _save(config: Any, path: Path, log: Log) -> None:
    cache = config.get_timing_cache()
    serialized = None if cache is None else _joined(config, cache, path, log)
    if serialized is None:
        refused = log.failure("TensorRT gave no timings after the build", "nothing")
        _LOG.warning("%s; the next build will take as long", refused)
    else:
        write_atomic(path, serialized)


def _joined(config: Any, cache: Any, path: Path, log: Log) -> Any:
    """The timings of this build and those on disk; without those where they cannot be joined."""
    if path.is_file():
        found = config.create_timing_cache(path.read_bytes())
        if found is None or not cache.combine(found, ignore_mismatch=False):
            refused = log.failure(f"TensorRT could not join the timings of {path}", "nothing")
            _LOG.warning("%s; those of this build take their place", refused)
    return cache.serialize()
