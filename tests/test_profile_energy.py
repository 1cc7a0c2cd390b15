"""A whole device profile with a power sensor: a recording that is played in its own time."""

from pathlib import Path

import pytest

pytest.importorskip("timm")
pytest.importorskip("openvino")

from lpvit_edge import files
from lpvit_edge import profile as profiling
from lpvit_edge.device_profile import profile_device
from lpvit_edge.job import prepare_without_images
from lpvit_edge.models import load_model
from lpvit_edge.records import DeviceProfile
from lpvit_profilers import detect
from lpvit_profilers.base import PowerSample, SourceInfo
from lpvit_profilers.replay import Recording, ReplaySource, read_recording, write_recording

POWER_MW = 10_000.0
INFO = SourceInfo(
    name="recorded board",
    sensor="a recording",
    scope="module_input",
    quality="measured",
    total_rule="VDD_IN",
    rails=("VDD_IN",),
    resolution_mw=1.0,
    period_s=0.002,
    averaging_s=0.0,
    has_counter=False,
    gain_class=None,
)


def recording(path: Path) -> Recording:
    """Ten seconds of 10 W within 1 %, through the file that `lpvit power` writes."""
    samples = (
        PowerSample(
            t_ns=index * 2_000_000,
            rails_mw={"VDD_IN": power_mw},
            total_mw=power_mw,
            quality="measured",
        )
        for index in range(5000)
        for power_mw in (POWER_MW * (0.99 + 0.01 * (index % 3)),)
    )
    write_recording(path, INFO, samples)
    return read_recording(path)


def test_each_form_and_the_rest_get_the_power_for_the_time_they_take(
    tiny_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ReplaySource(recording(tmp_path / "power.jsonl"), paced=True)
    monkeypatch.setattr(detect, "default_source", lambda **_: source)
    monkeypatch.setattr(profiling, "ENERGY_WINDOW_S", 0.1)
    job = prepare_without_images(
        load_model(str(tiny_project / "model.toml")),
        tmp_path,
        engine="openvino",
        threads=1,
        patterns=("64x1",),
    )
    profile_device(job, seconds=2.0, network_seconds=0.2)
    profile = files.load(DeviceProfile, tmp_path / "device_profile.json")
    assert (profile.power.source, profile.power.quality) == ("recorded board", "measured")
    measured = [gemm for gemm in profile.gemms if gemm.energy_mj is not None]
    assert len(measured) >= len(profile.gemms) // 2
    silent = len(profile.gemms) - len(measured)
    assert (profile.power.reason is None) == (silent == 0)
    # Power is steady, so energy is time; loosely, since latency and energy are timed one after the
    # other and other programs may come between.
    energy_mj = sum(gemm.energy_mj or 0.0 for gemm in measured)
    took_ms = sum(gemm.latency_ms for gemm in measured)
    assert 0.2 < energy_mj / (took_ms * POWER_MW / 1000.0) < 5.0
    assert profile.rest_energy_mj is not None
    dense_known = all(g.energy_mj is not None for g in profile.gemms if g.pattern == "dense")
    assert (profile.energy_sum_over_measured is not None) == dense_known
    assert 0.2 < profile.rest_energy_mj / (profile.rest_ms * POWER_MW / 1000.0) < 5.0
