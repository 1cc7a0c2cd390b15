"""The parser, on lines of every JetPack (token structure as printed, numbers made up)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpvit_profilers.tegrastats import parse_line

FOLDER = Path(__file__).parent / "fixtures" / "tegrastats"
# A busy machine is no failure of the parser.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TRUTH: dict[str, dict[str, Any]] = json.loads((FOLDER / "truth.json").read_text())
LINES = {name: (FOLDER / f"{name}.txt").read_text() for name in TRUTH}


def test_every_line_that_is_kept_has_its_truth() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(TRUTH)
    assert len(TRUTH) == 31


@pytest.mark.parametrize("name", TRUTH)
def test_a_line_gives_its_rails_and_total(name: str) -> None:
    truth, found = TRUTH[name], parse_line(LINES[name])
    assert found.rails_mw == {rail: value["cur"] for rail, value in truth["rails_mw"].items()}
    expected_mw = None if truth["total_w"] is None else pytest.approx(truth["total_w"] * 1000)
    assert found.total_mw == expected_mw
    assert found.total_rule == (None if truth["total_rule"] == "none" else truth["total_rule"])


@pytest.mark.parametrize("name", TRUTH)
def test_a_line_gives_its_gpu_memory_and_temperatures(name: str) -> None:
    truth, found = TRUTH[name], parse_line(LINES[name])
    percent, clocks = truth["gpu_util_pct"], truth["gr3d_mhz"]
    assert found.gpu_util == (None if percent is None else percent / 100)
    assert found.gpu_clock_mhz == (None if clocks is None else max(clocks))
    for field in ("ram_used_mb", "ram_total_mb", "swap_used_mb", "swap_total_mb"):
        assert getattr(found, field) == truth[field]
    measured = {zone: value for zone, value in truth["temps_c"].items() if zone != "PMIC"}
    assert found.temperatures_c == measured


@pytest.mark.parametrize(
    ("name", "online"),
    [
        ("nano_jp4u_idle", 4),
        ("tx2_jp4u_cpu-off", 4),
        ("agxxavier_jp4u_cpu-off", 4),
        ("agxorin64_jp72", 12),
        ("agxthor_r39_idle", 2),
        ("agxxavier_jp5u_fragment", 0),
    ],
)
def test_cores_that_are_off_do_not_count(name: str, online: int) -> None:
    assert parse_line(LINES[name]).cpu_cores_online == online


def test_a_clock_without_a_percentage_is_an_unknown_utilisation() -> None:
    found = parse_line("GR3D_FREQ @[1574,1574,1574]")
    assert (found.gpu_util, found.gpu_clock_mhz) == (None, 1574.0)


def test_no_rails_are_no_power_and_not_zero() -> None:
    found = parse_line(LINES["xaviernx_jp46_no-rails"])
    assert (found.rails_mw, found.total_mw, found.total_rule) == ({}, None, None)
    assert not found.suspect


def test_a_rail_above_its_total_is_suspect() -> None:
    assert parse_line(LINES["nano_jp46_swapped-rails"]).suspect
    assert not parse_line(LINES["nano_jp461"]).suspect


def test_thors_first_input_of_zero_is_suspect() -> None:
    assert parse_line("VDD_GPU 37528mW/37528mW VIN 0mW/0mW").suspect


def test_constants_and_zones_without_power_are_left_out() -> None:
    line = "PMIC@100C pmic@50C CV0@-256C gpu@41.8C/44C"
    assert parse_line(line).temperatures_c == {"gpu": 41.8}


def test_memory_cut_before_its_unit_is_not_a_rail() -> None:
    assert parse_line("RAM 2344/7852").rails_mw == {}


def test_a_clock_cut_in_its_bracket_is_unknown() -> None:
    assert parse_line("GR3D_FREQ 12%@[13").gpu_clock_mhz is None


@pytest.mark.parametrize("name", TRUTH)
def test_a_truncated_line_never_raises_and_never_invents_a_rail(name: str) -> None:
    line = LINES[name]
    whole = parse_line(line).rails_mw
    for end in range(len(line)):
        assert parse_line(line[:end]).rails_mw.items() <= whole.items()


@patient
@given(st.text())
def test_any_text_is_parsed_without_an_error(text: str) -> None:
    found = parse_line(text)
    assert found.gpu_util is None or 0 <= found.gpu_util <= 1


TOKENS = st.one_of(
    st.sampled_from(sorted({token for line in LINES.values() for token in line.split()})),
    st.text(alphabet="VDINR_0123456789/@%[],mWC.- off", max_size=20),
    st.integers(min_value=0).map(lambda n: f"VDD_IN {n}mW/{n}mW"),
)


@patient
@given(st.lists(TOKENS, max_size=40))
def test_shuffled_and_unknown_tokens_are_parsed_without_an_error(tokens: list[str]) -> None:
    found = parse_line(" ".join(tokens))
    assert all(value >= 0 for value in found.rails_mw.values())
    assert all(value > -100 for value in found.temperatures_c.values())


@patient
@given(
    rails=st.dictionaries(
        st.sampled_from(["VDD_IN", "VDD_SOC", "VDD_CPU_GPU_CV", "NEW_RAIL"]),
        st.integers(0, 999_999_999),
        min_size=1,
    ),
    form=st.sampled_from(["{0}/{0}", "{0}mW/{0}mW", "{0}mW/{0}mW/{0}mW"]),
)
def test_every_form_of_a_rail_gives_its_first_value(rails: dict[str, int], form: str) -> None:
    line = " ".join(f"{name} {form.format(value)}" for name, value in rails.items())
    found = parse_line(f"RAM 1/2MB {line} FUTURE_TOKEN x")
    assert found.rails_mw == rails
    assert found.total_mw == rails.get("VDD_IN")
