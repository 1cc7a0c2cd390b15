"""Jetson rails from constructed sysfs trees (tests/fixtures/sysfs/README.md)."""

import shutil
from pathlib import Path

import pytest

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers.base import opened
from lpvit_profilers.jetson_sysfs import JetsonSysfsSource
from lpvit_profilers.rails import find_rails

SYSFS = Path(__file__).parent / "fixtures" / "sysfs"
CHIP = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"


@pytest.fixture
def orin_nano(tmp_path: Path) -> Path:
    """A tree that a test may damage."""
    return Path(shutil.copytree(SYSFS / "orin_nano", tmp_path / "root"))


@pytest.mark.parametrize(
    ("board", "total_mw", "rule", "scope", "quality"),
    [
        ("orin_nano", 9250.304, "VDD_IN", "module_input", "measured"),
        ("agx_orin", 8737.6, "sum VDD_GPU_SOC+VDD_CPU_CV+VIN_SYS_5V0", "module", "summed"),
        ("agx_thor", 87426.0, "VIN", "board_input", "measured"),
        ("nano_legacy", 1750.0, "POM_5V_IN", "module_input", "measured"),
    ],
)
def test_each_board_has_its_own_total(
    board: str, total_mw: float, rule: str, scope: str, quality: str
) -> None:
    with opened(JetsonSysfsSource(SYSFS / board)) as source:
        sample, info = source.sample(), source.info
    assert sample.total_mw == pytest.approx(total_mw)
    assert (info.total_rule, info.scope, info.quality) == (rule, scope, quality)
    assert (sample.quality, sample.reason) == (quality, None)


def test_rails_keep_the_boards_names_and_unconnected_ones_are_skipped() -> None:
    with opened(JetsonSysfsSource(SYSFS / "agx_orin")) as source:
        assert source.sample().rails_mw == pytest.approx(
            {
                "VDD_GPU_SOC": 3200.0,
                "VDD_CPU_CV": 800.0,
                "VIN_SYS_5V0": 4737.6,
                "VDDQ_VDD2_1V8AO": 397.44,
            }
        )


def test_thor_shows_its_module_beside_the_board_input() -> None:
    with opened(JetsonSysfsSource(SYSFS / "agx_thor")) as source:
        assert source.sample().module_mw == pytest.approx(37520 + 18960 + 18330.48)


def test_the_hwmon_number_does_not_matter(orin_nano: Path) -> None:
    (orin_nano / CHIP).rename((orin_nano / CHIP).with_name("hwmon17"))
    with opened(JetsonSysfsSource(orin_nano)) as source:
        assert source.sample().total_mw == pytest.approx(9250.304)


def test_the_resolution_follows_the_shunt_and_the_voltage() -> None:
    steps = {rail.name: rail.resolution_mw() for rail in find_rails(SYSFS / "agx_orin")}
    assert steps["VDD_GPU_SOC"] == pytest.approx(400.0)
    assert steps["VIN_SYS_5V0"] == pytest.approx(100.8)
    with opened(JetsonSysfsSource(SYSFS / "orin_nano")) as source:
        assert source.info.resolution_mw == pytest.approx(39.872)


@pytest.mark.parametrize("content", ["", "garbage", "\0\n"], ids=["empty", "garbage", "nul"])
def test_a_rail_without_power_is_absent_and_the_others_go_on(orin_nano: Path, content: str) -> None:
    with opened(JetsonSysfsSource(orin_nano)) as source:
        (orin_nano / CHIP / "curr2_input").write_text(content)
        sample = source.sample()
    assert set(sample.rails_mw) == {"VDD_IN", "VDD_SOC"}
    assert sample.total_mw == pytest.approx(9250.304)


def test_a_total_without_its_rail_is_none_with_a_reason(orin_nano: Path) -> None:
    with opened(JetsonSysfsSource(orin_nano)) as source:
        (orin_nano / CHIP / "curr1_input").write_text("")
        lost = source.sample()
        (orin_nano / CHIP / "curr1_input").write_text("1000")
        back = source.sample()
    assert (lost.total_mw, lost.quality) == (None, "unavailable")
    assert lost.reason == "VDD_IN did not answer; the domain may be powered off"
    assert back.total_mw == pytest.approx(4984.0)


def test_a_sensor_that_answers_eagain_does_not_end_the_sampling(
    orin_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpowered(handle: int, length: int, offset: int) -> bytes:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with opened(JetsonSysfsSource(orin_nano)) as source:
        with monkeypatch.context() as patched:
            patched.setattr("lpvit_profilers.jetson_sysfs.os.pread", unpowered)
            assert source.sample().rails_mw == {}
        assert source.sample().total_mw == pytest.approx(9250.304)


def test_a_sub_rail_above_the_total_is_suspect(orin_nano: Path) -> None:
    (orin_nano / CHIP / "curr2_input").write_text("1900")
    with opened(JetsonSysfsSource(orin_nano)) as source:
        sample = source.sample()
    assert sample.quality == "suspect"
    assert sample.reason is not None
    assert "the labels may be swapped" in sample.reason


def test_two_steps_above_the_total_are_still_rounding(orin_nano: Path) -> None:
    (orin_nano / CHIP / "curr2_input").write_text("1870")
    with opened(JetsonSysfsSource(orin_nano)) as source:
        assert source.sample().quality == "measured"


def test_thor_without_its_input_sensor_has_no_total(tmp_path: Path) -> None:
    root = Path(shutil.copytree(SYSFS / "agx_thor", tmp_path / "root"))
    shutil.rmtree(root / "sys/bus/i2c/drivers/ina238")
    with pytest.raises(EnvironmentUnfitError, match="adding them up could count power twice"):
        JetsonSysfsSource(root).open()


def test_a_machine_without_sensors_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="no INA3221 or INA238 sensor"):
        JetsonSysfsSource(tmp_path).open()


def test_conditions_show_heat_clock_alarms_and_over_current_events(orin_nano: Path) -> None:
    (orin_nano / CHIP / "curr1_crit_alarm").write_text("1")
    with opened(JetsonSysfsSource(orin_nano)) as source:
        found = source.conditions()
    assert found.temperature_c == 63.781
    assert found.throttling == ("VDD_IN crit current",)
    assert found.throttle_events == 3
