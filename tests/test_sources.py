"""One contract for every power source, the replay included; and which source is chosen."""

import shutil
import stat
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from lpvit_edge.errors import EnvironmentUnfitError, FileFormatError, UnknownOptionError
from lpvit_profilers.base import (
    CONTAINING,
    Conditions,
    PowerSample,
    PowerSource,
    Scope,
    SourceInfo,
    WorkingPart,
    opened,
)
from lpvit_profilers.detect import default_source, detect, why_none
from lpvit_profilers.estimate import EstimatedSource, estimated_power_mw
from lpvit_profilers.fake_nvml import FakeNvml
from lpvit_profilers.jetson_sysfs import JetsonSysfsSource
from lpvit_profilers.nvml import NvmlSource
from lpvit_profilers.rapl import RaplSource
from lpvit_profilers.replay import ReplaySource, read_recording, write_recording
from lpvit_profilers.tegrastats_process import TegrastatsSource

FIXTURES = Path(__file__).parent / "fixtures"
SYSFS = FIXTURES / "sysfs"
Make = Callable[[Path], PowerSource]


def fake_tegrastats(folder: Path) -> str:
    path = folder / "tegrastats"
    path.write_text(
        f"#!{sys.executable}\nimport time\nwhile True:\n"
        "    print('VDD_IN 5000mW/5000mW', flush=True)\n    time.sleep(0.02)\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def fake_nvml() -> NvmlSource:
    library = FakeNvml(
        instant=lambda: 50_000, energy=lambda: int((time.monotonic() - 1.0) * 50_000)
    )
    return NvmlSource(library=library, probe_s=0.05)


def recorded(folder: Path, *, paced: bool = False) -> ReplaySource:
    """Five samples of a counting source, written to a file and read again."""
    info = SourceInfo(
        name="rapl",
        sensor="made up",
        scope="cpu_package",
        quality="measured",
        total_rule="package-0",
        rails=("package-0",),
        resolution_mw=None,
        period_s=0.02,
        averaging_s=0.0,
        has_counter=True,
        gain_class=None,
    )
    samples = [
        PowerSample(
            t_ns=7_000_000_000 + n * 20_000_000,
            rails_mw={"package-0": 1000.0},
            total_mw=1000.0,
            quality="measured",
            energy_mj=20.0 * n,
        )
        for n in range(5)
    ]
    write_recording(folder / "power.jsonl", info, samples)
    return ReplaySource(read_recording(folder / "power.jsonl"), paced=paced)


SOURCES: dict[str, Make] = {
    "jetson-sysfs": lambda _: JetsonSysfsSource(SYSFS / "agx_thor"),
    "jetson-iio": lambda _: JetsonSysfsSource(SYSFS / "nano_legacy"),
    "tegrastats": lambda folder: TegrastatsSource(fake_tegrastats(folder)),
    "nvml": lambda _: fake_nvml(),
    "rapl": lambda _: RaplSource(SYSFS / "rapl_server"),
    "estimate": lambda _: EstimatedSource(tdp_w=65.0),
    "replay": recorded,
    "replay-paced": lambda folder: recorded(folder, paced=True),
}


@pytest.fixture(params=SOURCES, ids=list(SOURCES))
def source(request: pytest.FixtureRequest, tmp_path: Path) -> PowerSource:
    return SOURCES[request.param](tmp_path)


def several(source: PowerSource, count: int = 4) -> list[PowerSample]:
    samples = []
    for _ in range(count):
        samples.append(source.sample())
        time.sleep(0.01)
    return samples


def test_times_never_run_backwards(source: PowerSource) -> None:
    with opened(source):
        times = [sample.t_ns for sample in several(source)]
    assert times == sorted(times)


def test_a_sample_has_only_announced_rails_and_a_total_or_a_reason(source: PowerSource) -> None:
    with opened(source):
        for sample in several(source):
            assert set(sample.rails_mw) <= set(source.info.rails)
            assert (sample.total_mw is None) == (sample.reason is not None)
            assert all(value >= 0 for value in sample.rails_mw.values())


def test_a_counter_never_falls_and_is_there_only_if_announced(source: PowerSource) -> None:
    with opened(source):
        counts = [sample.energy_mj for sample in several(source)]
        has_counter = source.info.has_counter
    known = [count for count in counts if count is not None]
    assert (len(known) == len(counts)) if has_counter else not known
    assert known == sorted(known)


def test_a_source_says_what_its_total_covers(source: PowerSource) -> None:
    with opened(source):
        info = source.info
    assert info.total_rule
    assert info.sensor
    assert info.period_s > 0
    assert msgspec.json.decode(msgspec.json.encode(info), type=SourceInfo) == info


def test_conditions_can_be_asked_at_any_time(source: PowerSource) -> None:
    with opened(source):
        # None where the source cannot see it, never a guess that nothing is wrong
        assert source.conditions().throttling in ((), None)


def test_a_source_can_be_opened_again_after_closing(source: PowerSource) -> None:
    for _ in range(2):
        with opened(source):
            assert several(source, 2)[-1].total_mw is not None


def test_a_sample_survives_json(source: PowerSource) -> None:
    with opened(source):
        sample = source.sample()
    assert msgspec.json.decode(msgspec.json.encode(sample), type=PowerSample) == sample


def test_a_closed_source_describes_nothing(source: PowerSource) -> None:
    with pytest.raises(AssertionError, match="not open"):
        _ = source.info


# --- the replay -------------------------------------------------------------------------------


def test_a_recording_plays_its_own_times_and_then_ends(tmp_path: Path) -> None:
    with opened(recorded(tmp_path)) as source:
        times = [source.sample().t_ns for _ in range(5)]
        assert [b - a for a, b in pairwise(times)] == [20_000_000] * 4
        assert source.remaining == 0
        assert source.sample().reason == "the recording is at its end"


def test_a_log_of_tegrastats_gets_its_times_from_its_dates(tmp_path: Path) -> None:
    lines = [f"01-02-2030 03:04:0{n // 2} RAM 1/2MB VDD_IN {5000 + n}/1" for n in range(9)]
    (tmp_path / "boot.log").write_text("\n".join(lines) + "\n")
    recording = read_recording(tmp_path / "boot.log")
    assert [sample.t_ns for sample in recording.samples[:3]] == [0, 500_000_000, 1_000_000_000]
    assert recording.samples[3].total_mw == 5003.0
    assert recording.info.notes == ("one line every 0.500 s, from the first and the last date",)


def test_a_log_that_was_cut_in_its_last_line_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "boot.log").write_text("VDD_SOC 900/1 VDD_IN 5000/1\nVDD_SOC 900/1 VDD_I")
    recording = read_recording(tmp_path / "boot.log", interval_s=0.1)
    assert [sample.total_mw for sample in recording.samples] == [5000.0, None]
    assert recording.samples[1].reason == "the line lacks VDD_IN"


def test_a_suspect_line_of_a_log_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "boot.log").write_text("POM_5V_GPU 8791/1 POM_5V_IN 3075/1\n")
    (sample,) = read_recording(tmp_path / "boot.log", interval_s=0.1).samples
    assert sample.quality == "suspect"
    assert sample.reason is not None
    assert "the rails contradict POM_5V_IN" in sample.reason


@pytest.mark.parametrize("interval_s", [0.0, -1.0, float("nan"), float("inf")])
def test_an_interval_that_is_no_time_is_refused(tmp_path: Path, interval_s: float) -> None:
    (tmp_path / "boot.log").write_text("VDD_IN 5000/1\n")
    with pytest.raises(UnknownOptionError, match="the interval is"):
        read_recording(tmp_path / "boot.log", interval_s=interval_s)


def test_a_log_without_dates_needs_a_stated_interval(tmp_path: Path) -> None:
    (tmp_path / "boot.log").write_text("VDD_IN 5000/1\nVDD_IN 6000/1\n")
    with pytest.raises(FileFormatError, match="state the interval"):
        read_recording(tmp_path / "boot.log")
    recording = read_recording(tmp_path / "boot.log", interval_s=0.1)
    assert [sample.t_ns for sample in recording.samples] == [0, 100_000_000]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no power rails with a known total in 0 lines"),
        (b"RAM 1/2MB\n", "no power rails with a known total in 1 lines"),
        (b"\xff\xfe", "not text"),
        (b"{}\n", "line 1"),
        (b'{"kind": "x", "format": 2, "info": 3}\n', "line 1"),
    ],
    ids=["empty", "no-rails", "binary", "no-header", "bad-header"],
)
def test_a_file_that_is_no_recording_is_refused_in_words(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(FileFormatError, match=complaint):
        read_recording(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda lines: [*lines[:2], lines[2][:20]], "line 3"),
        (lambda lines: [lines[0], lines[2], lines[1]], "line 3 is earlier"),
        (lambda lines: lines[:1], "holds no sample"),
        (lambda lines: [lines[0].replace('"format":2', '"format":9')], "format 9"),
        (lambda lines: [lines[0], lines[1].replace('"t_ns"', '"t_ms"')], "line 2"),
    ],
    ids=["cut", "backwards", "empty", "newer", "misspelt"],
)
def test_a_damaged_recording_is_refused_at_its_line(
    tmp_path: Path, change: Callable[[list[str]], list[str]], complaint: str
) -> None:
    recorded(tmp_path)
    lines = (tmp_path / "power.jsonl").read_text().splitlines()
    (tmp_path / "x").write_text("\n".join(change(lines)))
    with pytest.raises(FileFormatError, match=complaint):
        read_recording(tmp_path / "x")


def test_an_absent_recording_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_recording(tmp_path / "none")


# --- the estimate -----------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "power_mw"), [(0.0, 6500.0), (0.5, 13812.5), (1.0, 65000.0)])
def test_the_estimate_follows_its_stated_curve(load: float, power_mw: float) -> None:
    assert estimated_power_mw(load, tdp_w=65.0) == pytest.approx(power_mw)


def test_an_estimate_is_labelled_everywhere() -> None:
    with opened(EstimatedSource(tdp_w=65.0)) as source:
        sample = source.sample()
        assert (source.info.quality, sample.quality) == ("estimated", "estimated")
        assert list(sample.rails_mw) == ["CPU (estimated)"]


@pytest.mark.parametrize("tdp_w", [0.0, -5.0, 1e6, float("nan")])
def test_an_estimate_needs_a_sensible_tdp(tdp_w: float) -> None:
    with pytest.raises(UnknownOptionError, match="state the processor's TDP in watts"):
        EstimatedSource(tdp_w=tdp_w)


# --- the choice -------------------------------------------------------------------------------


@pytest.fixture
def no_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a GPU and a tegrastats of the machine that runs the tests out of the choice."""

    def absent() -> PowerSource:
        raise EnvironmentUnfitError("absent in this test")

    monkeypatch.setattr("lpvit_profilers.detect.NvmlSource", absent)
    monkeypatch.setattr("lpvit_profilers.detect.TegrastatsSource", absent)


def usable(root: Path) -> list[str]:
    return [found.name for found in detect(root) if found.usable]


@pytest.mark.usefixtures("no_vendor")
@pytest.mark.parametrize(
    ("tree", "expected"),
    [("orin_nano", ["jetson-sysfs"]), ("agx_thor", ["jetson-sysfs"]), ("none", [])],
)
def test_the_best_source_is_chosen_by_what_is_there(tree: str, expected: list[str]) -> None:
    assert usable(SYSFS / tree) == expected
    chosen = default_source(SYSFS / tree)
    assert [type(chosen).__name__] == (["JetsonSysfsSource"] if expected else ["NoneType"])


class Board:
    """A source of one scope that always reads 30 W."""

    def __init__(self, scope: Scope) -> None:
        self.info = SourceInfo(
            name="board",
            sensor="made for this test",
            scope=scope,
            quality="measured",
            total_rule="VDD_IN",
            rails=(),
            resolution_mw=None,
            period_s=0.01,
            averaging_s=0.0,
            has_counter=False,
            gain_class=None,
        )

    def open(self) -> None: ...

    def close(self) -> None: ...

    def conditions(self) -> Conditions:
        return Conditions()

    def sample(self) -> PowerSample:
        return PowerSample(t_ns=1, rails_mw={}, total_mw=30_000.0, quality="measured")


@pytest.mark.usefixtures("no_vendor")
def test_the_source_chosen_covers_the_part_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpvit_profilers.detect.NvmlSource", lambda: Board("gpu_board"))
    monkeypatch.setattr("lpvit_profilers.detect.RaplSource", lambda _: Board("cpu_package"))

    def scope(working: WorkingPart | None) -> Scope | None:
        chosen = default_source(tmp_path, working=working)
        return None if chosen is None else chosen.info.scope

    assert (scope("cpu"), scope("gpu"), scope(None)) == ("cpu_package", "gpu_board", "gpu_board")
    monkeypatch.setattr("lpvit_profilers.detect.RaplSource", lambda _: Board("rail"))
    assert scope("cpu") is None
    reasons = why_none(detect(tmp_path), working="cpu")
    assert "nvml: it measures the GPU board only" in reasons
    assert "rapl: it measures single rails only" in reasons
    assert "nvml" not in why_none(detect(tmp_path))
    # on a Jetson the module's input covers both
    for part in CONTAINING:
        assert type(default_source(SYSFS / "orin_nano", working=part)).__name__ == (
            "JetsonSysfsSource"
        )


@pytest.mark.usefixtures("no_vendor")
def test_every_source_that_is_not_usable_says_why(tmp_path: Path) -> None:
    found = detect(tmp_path)
    names = ["jetson-sysfs", "tegrastats", "nvml", "rapl", "estimate"]
    assert [d.name for d in found] == names
    assert all(d.reason and not d.usable for d in found)
    assert "tegrastats: this is not a Jetson" in why_none(found)


@pytest.mark.usefixtures("no_vendor")
def test_the_estimate_is_never_the_default(tmp_path: Path) -> None:
    found = {d.name: d for d in detect(tmp_path, tdp_w=65.0)}
    assert found["estimate"].usable
    assert found["estimate"].reason.endswith("estimated")
    assert default_source(tmp_path) is None


@pytest.mark.usefixtures("no_vendor")
def test_a_counter_that_stands_still_is_not_usable() -> None:
    found = {d.name: d for d in detect(SYSFS / "rapl_server")}
    assert not found["rapl"].usable
    assert found["rapl"].reason == "it reads exactly 0 mW, which no running machine draws"


@pytest.mark.usefixtures("no_vendor")
def test_rails_that_contradict_each_other_are_not_chosen(tmp_path: Path) -> None:
    root = Path(shutil.copytree(SYSFS / "orin_nano", tmp_path / "root"))
    chip = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    (chip / "curr2_input").write_text("9000")
    found = {d.name: d for d in detect(root)}
    assert not found["jetson-sysfs"].usable
    assert "contradict each other" in found["jetson-sysfs"].reason


def test_nvml_is_not_asked_on_an_orin(tmp_path: Path) -> None:
    compatible = tmp_path / "proc/device-tree/compatible"
    compatible.parent.mkdir(parents=True)
    compatible.write_text("nvidia,p3767-0003\0nvidia,tegra234\0")
    found = {d.name: d for d in detect(tmp_path)}
    assert found["nvml"].reason == "on tegra234 NVML tells nothing but the GPU's name"
