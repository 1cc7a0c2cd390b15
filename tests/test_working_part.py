"""Who asks for a power sensor names the part of the machine that works."""

from pathlib import Path

import pytest

from lpvit_edge.dashboard.power import monitor_of_this_device
from lpvit_edge.energy import energies
from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_edge.profile_power import sensor_of
from lpvit_edge.records import PowerNote
from lpvit_profilers import energy as measuring
from lpvit_profilers.base import PowerSource
from tests.test_sources import Board, no_vendor  # noqa: F401  (fixtures)

NO_ESTIMATE = "the estimate from --tdp-w is of a processor, and the work is on the GPU"


@pytest.fixture
def idle_gpu(no_vendor: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A machine whose one sensor is that of its GPU's board."""

    def absent(_: Path) -> PowerSource:
        raise EnvironmentUnfitError("absent in this test")

    monkeypatch.setattr("lpvit_profilers.detect.NvmlSource", lambda: Board("gpu_board"))
    monkeypatch.setattr("lpvit_profilers.detect.JetsonSysfsSource", absent)
    monkeypatch.setattr("lpvit_profilers.detect.RaplSource", absent)


def noted(engine: str, tdp_w: float | None = None) -> PowerNote:
    with sensor_of(engine, tdp_w) as (sensor, note):
        assert (sensor is None) == (note.source is None)
        return note


@pytest.mark.usefixtures("idle_gpu")
def test_a_profile_takes_no_energy_of_cpu_work_from_the_board_of_a_gpu() -> None:
    cpu, gpu = noted("openvino"), noted("tensorrt")
    assert (gpu.source, gpu.scope, gpu.quality) == ("board", "gpu_board", "measured")
    assert (cpu.source, cpu.quality) == (None, "unavailable")
    assert cpu.reason is not None
    assert cpu.reason.startswith("no power sensor that covers the CPU can be read here (")
    assert "nvml: it measures the GPU board only; " in cpu.reason
    assert "state --tdp-w to see it" in cpu.reason


@pytest.mark.usefixtures("idle_gpu")
def test_a_check_takes_no_energy_of_cpu_work_from_the_board_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[PowerSource] = []

    def measured(_: object, source: PowerSource, **__: object) -> dict[str, object]:
        asked.append(source)
        return {}

    monkeypatch.setattr(measuring, "measure_energies", measured)
    found = energies({"dense": lambda: None}, engine="openvino", window_s=0.1)["dense"]
    assert (found.per_image_mj, found.source, found.quality) == (None, None, "unavailable")
    assert "nvml: it measures the GPU board only" in (found.reason or "")
    assert asked == []
    energies({"dense": lambda: None}, engine="tensorrt", window_s=0.1)
    assert [source.info.scope for source in asked] == ["gpu_board"]


@pytest.mark.usefixtures("idle_gpu")
def test_the_page_shows_no_power_of_a_gpu_for_work_on_the_cpu(tmp_path: Path) -> None:
    with monitor_of_this_device(tmp_path, working="cpu") as monitor:
        power = monitor.now()
    assert power.source is None
    assert power.reason is not None
    assert power.reason.startswith("no power sensor that covers the CPU can be read here: ")


@pytest.mark.usefixtures("no_vendor")
def test_the_estimate_is_of_a_processor_and_not_offered_for_work_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lpvit_profilers.detect.default_source", lambda **_: None)
    on_gpu = noted("tensorrt", 65.0)
    assert (on_gpu.source, on_gpu.quality) == (None, "unavailable")
    assert NO_ESTIMATE in (on_gpu.reason or "")
    unasked = noted("tensorrt").reason or ""
    assert NO_ESTIMATE not in unasked
    for reason in (on_gpu.reason or "", unasked):
        assert "estimate: " not in reason
        assert "state --tdp-w" not in reason
    on_cpu = noted("openvino", 65.0)
    assert (on_cpu.source, on_cpu.quality) == ("estimate", "estimated")


@pytest.mark.usefixtures("idle_gpu")
def test_a_stated_tdp_that_is_not_used_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    noted("tensorrt")
    assert "--tdp-w" not in capsys.readouterr().err
    assert noted("tensorrt", 65.0).source == "board"
    assert "a sensor measures here: --tdp-w is not used" in capsys.readouterr().err
