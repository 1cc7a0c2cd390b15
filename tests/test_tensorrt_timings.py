"""The timing cache: one file for each TensorRT, device and clocks, for all processes."""

from pathlib import Path

import pytest

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt import config as settings
from lpvit_engines.tensorrt.log import Log


class Cache:
    """A timing cache that holds entries by name."""

    def __init__(self, content: bytes) -> None:
        self.entries = set(content.decode().split())

    def combine(self, other: "Cache", *, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.entries |= other.entries
        return True

    def serialize(self) -> bytes:
        return " ".join(sorted(self.entries)).encode()


class Config:
    def __init__(self) -> None:
        self.cache: Cache | None = None
        self.accepts = True

    def create_timing_cache(self, content: bytes) -> Cache:
        return Cache(content)

    def set_timing_cache(self, cache: Cache, *, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return self.accepts

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def test_timings_of_two_processes_end_up_in_one_cache(tmp_path: Path) -> None:
    path = settings.timing_cache_path(tmp_path, version="10.3.0", device="Orin 8.7")
    assert path.name == "timing-10.3.0-orin-8.7.cache"
    first, second = Config(), Config()
    for one, entry in ((first, "a"), (second, "b")):
        settings.attach_timing_cache(one, path, Log())
        assert one.cache is not None
        one.cache.entries.add(entry)
    settings.save_timing_cache(first, path, Log())
    settings.save_timing_cache(second, path, Log())
    assert path.read_bytes() == b"a b"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".cache", ".lock"]


def test_a_refused_timing_cache_is_named(tmp_path: Path) -> None:
    refusing = Config()
    refusing.accepts = False
    with pytest.raises(EngineError, match=r"refused the timing cache .* delete that file"):
        settings.attach_timing_cache(refusing, tmp_path / "t.cache", Log())


def test_timings_of_other_clocks_are_another_file(tmp_path: Path) -> None:
    gpu = tmp_path / "17000000.gpu"
    gpu.mkdir()
    (gpu / "min_freq").write_text("306000000\n")
    paths = set()
    for hz, text in ((918000000, "306-918 MHz"), (624750000, "306-625 MHz")):
        (gpu / "max_freq").write_text(f"{hz}\n")
        assert settings.gpu_clocks(tmp_path) == text
        path = settings.timing_cache_path(tmp_path, version="10.3.0", device="Orin", clocks=text)
        paths.add(path.name)
    assert paths == {
        "timing-10.3.0-orin-306-918-mhz.cache",
        "timing-10.3.0-orin-306-625-mhz.cache",
    }
    (gpu / "max_freq").unlink()
    assert settings.gpu_clocks(tmp_path) == "306-? MHz"
    assert settings.gpu_clocks(tmp_path / "absent") == ""
