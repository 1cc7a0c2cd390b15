"""RAPL counters from constructed powercap trees (tests/fixtures/sysfs/README.md)."""

import os
import shutil
from pathlib import Path

import pytest

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers.base import PowerSample, opened
from lpvit_profilers.rapl import RaplSource

SYSFS = Path(__file__).parent / "fixtures" / "sysfs"
ZONE = "sys/class/powercap/intel-rapl/intel-rapl:0"


@pytest.fixture
def server(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SYSFS / "rapl_server", tmp_path / "server"))


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SYSFS / "rapl_laptop", tmp_path / "laptop"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in ns, as a list of one that a test may move."""
    now = [1_000_000_000]
    monkeypatch.setattr("lpvit_profilers.rapl.time.monotonic_ns", lambda: now[0])
    return now


def count(root: Path, zone: str, energy_uj: int) -> None:
    (root / "sys/class/powercap/intel-rapl" / zone / "energy_uj").write_text(f"{energy_uj}\n")


def test_packages_are_added_up_and_memory_is_a_rail_of_its_own(
    server: Path, clock: list[int]
) -> None:
    with opened(RaplSource(server)) as source:
        source.sample()
        count(server, "intel-rapl:0", 262_143_100_000)  # 0.1 J
        count(server, "intel-rapl:0/intel-rapl:0:0", 77_040_000)  # 0.04 J
        count(server, "intel-rapl:1", 5_200_000)  # 0.2 J
        clock[0] += 100_000_000
        sample = source.sample()
        assert source.info.total_rule == "package-0+package-1"
    assert sample.rails_mw == {"package-0": 1000.0, "package-1": 2000.0, "package-0 dram": 400.0}
    assert (sample.total_mw, sample.energy_mj) == (3000.0, 300.0)


def test_a_counter_that_wraps_goes_on_growing(server: Path, clock: list[int]) -> None:
    with opened(RaplSource(server)) as source:
        source.sample()
        count(server, "intel-rapl:0", 671_150)  # 328850 uJ to the wrap, then 671150
        clock[0] += 1_000_000_000
        sample = source.sample()
    assert sample.rails_mw["package-0"] == 1000.0
    assert sample.energy_mj == 1000.0


def test_a_counter_that_was_reset_is_a_gap_and_counts_on(server: Path, clock: list[int]) -> None:
    def read(zero_uj: int, one_uj: int) -> PowerSample:
        count(server, "intel-rapl:0", zero_uj)
        count(server, "intel-rapl:1", one_uj)
        clock[0] += 1_000_000_000
        return source.sample()

    count(server, "intel-rapl:0", 100_000_000_000)
    with opened(RaplSource(server)) as source:
        source.sample()
        reset = read(3_000_000, 6_000_000)  # 100 kJ to 3 J: as a wrap it would be 162 kJ in 1 s
        assert (reset.total_mw, reset.energy_mj, reset.counter_gaps) == (None, None, 1)
        assert reset.rails_mw == {"package-0 dram": 0.0, "package-1": 1000.0}
        assert reset.reason is not None
        assert reset.reason.startswith("intel-rapl:0 fell by 1e+05 J in 1 s; it was reset")
        assert read(4_000_000, 7_000_000).reason == "power needs two samples"
        after = read(5_000_000, 8_000_000)
    assert (after.total_mw, after.counter_gaps) == (2000.0, 1)
    assert after.energy_mj == 1000.0 * 2 + 1000.0 * 3  # the second that nobody saw is not in it


def test_a_wrap_of_unknown_range_is_a_gap_and_counts_on(server: Path, clock: list[int]) -> None:
    (server / ZONE / "max_energy_range_uj").unlink()
    with opened(RaplSource(server)) as source:
        count(server, "intel-rapl:0", 5_000_000)
        clock[0] += 1_000_000_000
        sample = source.sample()
        assert (sample.energy_mj, sample.total_mw, sample.counter_gaps) == (None, None, 1)
        assert "does not say where it wraps" in str(sample.reason)
        count(server, "intel-rapl:0", 7_000_000)
        clock[0] += 1_000_000_000
        assert source.sample().energy_mj == 2000.0


def test_a_jump_that_no_processor_could_draw_is_a_gap(server: Path, clock: list[int]) -> None:
    with opened(RaplSource(server)) as source:
        source.sample()
        count(server, "intel-rapl:1", 905_000_000_000)
        clock[0] += 1_000_000_000
        sample = source.sample()
    assert sample.counter_gaps == 1
    assert "rose by 9.05e+05 J in 1 s" in str(sample.reason)


def test_a_counter_left_alone_for_as_long_as_it_takes_to_wrap_is_a_gap(
    server: Path, clock: list[int]
) -> None:
    with opened(RaplSource(server)) as source:
        source.sample()
        clock[0] += 3600 * 1_000_000_000
        sample = source.sample()
    assert sample.energy_mj is None
    assert "was not read for 3600 s, in which it may wrap unseen" in str(sample.reason)


def test_nested_domains_are_never_added(laptop: Path, clock: list[int]) -> None:
    with opened(RaplSource(laptop)) as source:
        source.sample()
        for zone in ("", "/intel-rapl:0:0", "/intel-rapl:0:1"):
            count(laptop, f"intel-rapl:0{zone}", 2_000_000)
        count(laptop, "intel-rapl:1", 9_000_000)  # psys
        clock[0] += 1_000_000_000
        sample = source.sample()
    assert sample.rails_mw == {"package-0": 1000.0}
    assert sample.total_mw == 1000.0


def test_the_whole_platform_is_counted_on_request(laptop: Path, clock: list[int]) -> None:
    with opened(RaplSource(laptop, whole_platform=True)) as source:
        source.sample()
        count(laptop, "intel-rapl:0", 2_000_000)
        count(laptop, "intel-rapl:1", 9_000_000)
        clock[0] += 1_000_000_000
        assert source.sample().rails_mw == {"psys": 8000.0}
        assert source.info.scope == "board_input"
        assert "only the processor" not in source.info.notes[0]


def test_the_memory_mapped_view_of_a_package_is_not_counted_again(server: Path) -> None:
    zone = server / "sys/class/powercap/intel-rapl-mmio/intel-rapl-mmio:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("1\n")
    with opened(RaplSource(server)) as source:
        assert source.info.rails == ("package-0", "package-1", "package-0 dram")


def test_the_first_sample_has_energy_but_no_power(server: Path) -> None:
    with opened(RaplSource(server)) as source:
        sample = source.sample()
    assert (sample.total_mw, sample.energy_mj) == (None, 0.0)
    assert sample.reason == "power needs two samples"


def test_a_forbidden_counter_gives_the_remedy_in_one_line(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def forbidden(path: Path, flags: int) -> int:
        if Path(path).name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path, flags)

    monkeypatch.setattr("lpvit_profilers.rapl.os.open", forbidden)
    with pytest.raises(EnvironmentUnfitError) as caught:
        RaplSource(server).open()
    assert "energy_uj is readable for root only; sudo chmod a+r" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_machine_without_rapl_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="not in most virtual machines"):
        RaplSource(tmp_path).open()


def test_a_source_can_be_opened_again(server: Path) -> None:
    source = RaplSource(server)
    for _ in range(2):
        with opened(source):
            assert source.sample().energy_mj == 0.0


def test_a_counter_that_failed_at_the_opening_counts_from_its_first_answer(server: Path) -> None:
    energy = server / ZONE / "energy_uj"
    before = energy.read_text()
    energy.write_text("")
    with opened(RaplSource(server)) as source:
        energy.write_text(before)
        source.sample()
        energy.write_text(str(int(before) + 2_000))
        assert source.sample().energy_mj == 2.0


def test_a_refused_opening_leaves_no_file_open(server: Path) -> None:
    (server / "sys/class/powercap/intel-rapl/intel-rapl:1/energy_uj").unlink()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(EnvironmentUnfitError, match="cannot open"):
        RaplSource(server).open()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
