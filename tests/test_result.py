"""The document of a run: targets, energy, and files that are not one."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lpvit_edge.energy import unavailable, why_no_energy
from lpvit_edge.errors import FileFormatError, MissingDependencyError
from lpvit_edge.records import (
    Allocation,
    Check,
    Choice,
    DeviceProfile,
    Energy,
    EngineCheck,
    ExportLog,
    Latency,
    ModelIdentity,
    PowerNote,
)
from lpvit_edge.result import document, load_document
from lpvit_edge.targets import is_share, judge
from lpvit_profilers.detect import Detected, detect

MODEL = ModelIdentity(name="tiny", weights_sha256="00", image_size=32)
RAPL = Energy(
    per_image_mj=12.0,
    ci95_mj=0.5,
    mean_power_mw=9000.0,
    source="rapl",
    scope="cpu_package",
    quality="measured",
    reason=None,
)


def latency(median_ms: float) -> Latency:
    return Latency(
        median_ms=median_ms,
        p99_ms=median_ms * 1.1,
        spread_ms=0.01,
        samples_ms=(median_ms,),
        stable=True,
    )


def side(median_ms: float, energy: Energy) -> EngineCheck:
    return EngineCheck(
        latency=latency(median_ms),
        throughput_per_s=1000.0 / median_ms,
        accuracy=0.5,
        correct=5,
        images=10,
        weight_bytes=1000,
        energy=energy,
    )


def check(dense_ms: float, sparse_ms: float) -> Check:
    return Check(
        fingerprint="00",
        dense_onnx_sha256="00",
        onnx_sha256="00",
        heldout_sha256="00",
        dense=side(dense_ms, RAPL),
        sparse=side(sparse_ms, unavailable("the sensor went away")),
        speedup=dense_ms / sparse_ms,
        predicted_latency_ms=5.0,
        accuracy_drop=0.0,
        agreement=1.0,
        skipped=(),
    )


def profile(dense_ms: float) -> DeviceProfile:
    return DeviceProfile(
        device={"machine": "x86_64"},
        fingerprint="f",
        engine="openvino",
        engine_version="1",
        precision="float32",
        threads=1,
        batch=1,
        model=MODEL,
        layers=(),
        gemms=(),
        dense=latency(dense_ms),
        rest_ms=1.0,
        sum_over_measured=1.0,
        in_place_ms={},
        rank_correlation=None,
        drift=0.0,
        power=PowerNote(source=None, scope=None, quality="unavailable", reason="none"),
        reasons=(),
    )


CHOICE = Choice(
    layer="fc", pattern="32x32", sparsity=0.5, latency_ms=1, dense_latency_ms=2, distortion=0
)
ALLOCATION = Allocation(
    model=MODEL,
    fingerprint="f",
    allocator="milp",
    criterion="taylor",
    budget={},
    choices=(CHOICE,),
    predicted_latency_ms=5.0,
    predicted_dense_ms=10.0,
    distortion=0.0,
    bound=("latency_ms",),
    macs=40.0,
    dense_macs=100.0,
)


def met(checked: Check, asked: str, limit: float, *, key: str = "latency_ms") -> bool | None:
    (target,) = judge({key: asked}, {key: limit}, ALLOCATION, checked)
    return target.met


def made(
    target: str, target_ms: float, checked: Check, *, precision: str = "float32"
) -> dict[str, Any]:
    export = ExportLog(
        model_sha256="00",
        onnx_sha256="00",
        images=1,
        tolerance=1e-3,
        onnxruntime_error=1e-6,
        engine_error=1e-6,
        dense_engine_error=1e-6,
    )
    targets = judge({"latency_ms": target}, {"latency_ms": target_ms}, ALLOCATION, checked)
    return document(
        profile(10.0),
        ALLOCATION,
        export,
        checked,
        precision=precision,
        targets=targets,
        curve=(),
        report="report.html",
    )


def written(content: dict[str, Any], folder: Path) -> Path:
    path = folder / "optimize.json"
    path.write_bytes(msgspec.json.encode(content))
    return path


def test_the_precision_is_that_of_the_checked_engines_and_another_profile_is_a_doubt() -> None:
    same, other = (made("0.5x", 5.0, check(10.0, 4.0), precision=p) for p in ("float32", "bf16"))
    assert (same["precision"], other["precision"]) == ("float32", "bf16")
    assert other["profile_reasons"] == [
        *same["profile_reasons"],
        "it was measured in float32, and the engines ran in bf16",
    ]


@pytest.mark.parametrize(
    ("sparse_ms", "by_share", "by_time"),
    # The profile's dense engine took 10 ms, the one of this run 20 ms: half is 5 ms or 10 ms.
    [(5.2, True, True), (5.3, True, False), (10.4, True, False), (10.6, False, False)],
)
def test_a_share_is_held_against_the_same_run_and_a_time_against_itself(
    sparse_ms: float, by_share: bool, by_time: bool
) -> None:
    checked = check(20.0, sparse_ms)
    assert met(checked, "0.5x", 5.0) is by_share
    assert met(checked, "5ms", 5.0) is by_time
    assert made("0.5x", 5.0, checked)["target_met"] is by_share
    assert made("5ms", 5.0, checked)["target_met"] is by_time


def test_a_fast_minute_does_not_excuse_a_share_that_is_missed() -> None:
    assert met(check(5.0, 4.0), "0.5x", 5.0) is False
    assert met(check(5.0, 4.0), "5ms", 5.0) is True


def test_counted_targets_have_no_tolerance_and_unmeasured_ones_no_verdict() -> None:
    checked = check(10.0, 5.0)  # no energy of the sparse engine; weights as large as the dense ones
    assert met(checked, "0.4x", 40.0, key="macs") is True
    assert met(checked, "39M", 39.0, key="macs") is False
    assert met(checked, "0.99x", 990.0, key="weight_bytes") is False
    assert met(checked, "1kB", 1000.0, key="weight_bytes") is True
    asked = {"energy_mj": "0.5x", "power_mw": "9W"}
    targets = judge(asked, {"energy_mj": 6.0, "power_mw": 9000.0}, ALLOCATION, checked)
    assert [(t.met, t.reason) for t in targets] == [(None, "the sensor went away")] * 2


def test_only_an_x_makes_a_share() -> None:
    assert [is_share(t) for t in ("0.5x", " 0.5 x ", "12ms", "0.012s")] == [
        True,
        True,
        False,
        False,
    ]


def test_the_document_keeps_the_target_as_given_and_all_of_the_energy() -> None:
    content = made("0.5x", 5.0, check(10.0, 5.0))
    assert content["target"] == "0.5x"
    dense, sparse = content["dense"], content["sparse"]
    assert (dense["energy_per_image_mj"], dense["energy_ci95_mj"]) == (12.0, 0.5)
    assert (dense["energy_source"], dense["energy_scope"]) == ("rapl", "cpu_package")
    assert dense["mean_power_mw"] == 9000.0
    assert (sparse["energy_ci95_mj"], sparse["mean_power_mw"]) == (None, None)
    assert sparse["energy_reason"] == "the sensor went away"


def test_a_document_reads_back_as_it_was_written(tmp_path: Path) -> None:
    content = made("0.5x", 5.0, check(10.0, 5.0))
    expected = msgspec.json.decode(msgspec.json.encode(content))
    assert load_document(written(content, tmp_path)) == expected


def test_every_key_that_is_missing_is_named(tmp_path: Path) -> None:
    whole = made("0.5x", 5.0, check(10.0, 5.0))
    for key in set(whole) - {"schema"}:
        cut = {k: v for k, v in whole.items() if k != key}
        with pytest.raises(FileFormatError, match=f"optimize.json: .*`{key}`.*--resume"):
            load_document(written(cut, tmp_path))
    for key in whole["dense"]:
        cut = {**whole, "dense": {k: v for k, v in whole["dense"].items() if k != key}}
        with pytest.raises(FileFormatError, match=rf"`{key}`.*\$\.dense"):
            load_document(written(cut, tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers": []}, "layers"),
        ({"speedup": "fast"}, "speedup"),
        ({"target_latency_ms": 0}, "target_latency_ms"),
        ({"schema": "lpvit.optimize/0"}, "lpvit.optimize/0"),
    ],
)
def test_a_value_that_the_report_cannot_draw_is_named(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    content = {**made("0.5x", 5.0, check(10.0, 5.0)), **change}
    with pytest.raises(FileFormatError, match=named):
        load_document(written(content, tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"schema": "lpvit.opt'])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "optimize.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"not an optimize\.json"):
        load_document(tmp_path / "optimize.json")


def no_vendor(*_: object) -> None:
    raise MissingDependencyError("cannot import pynvml: No module named 'pynvml'")


def test_a_machine_without_sensors_says_so_in_so_many_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpvit_profilers.nvml.require", no_vendor)
    assert why_no_energy(detect(tmp_path)) == "no power sensor on this machine"


def test_a_counter_that_only_root_may_read_is_not_called_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = os.open

    def forbidden(path: Path, flags: int) -> int:
        if Path(path).name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return real(path, flags)

    monkeypatch.setattr("lpvit_profilers.nvml.require", no_vendor)
    monkeypatch.setattr("lpvit_profilers.rapl.os.open", forbidden)
    reason = why_no_energy(detect(Path(__file__).parent / "fixtures" / "sysfs" / "rapl_server"))
    assert reason.startswith("rapl: ")
    assert "energy_uj is readable for root only; sudo chmod a+r" in reason
    assert "jetson" not in reason


def test_a_sensor_that_opens_and_reads_nothing_is_named() -> None:
    found = (
        Detected(name="tegrastats", usable=False, reason="this is not a Jetson"),
        Detected(name="nvml", usable=False, reason="it reads exactly 0 mW"),
    )
    assert why_no_energy(found) == "nvml: it reads exactly 0 mW"


def test_a_gpu_that_forbids_is_not_a_gpu_that_is_not_there() -> None:
    def nvml(error: str) -> tuple[Detected, ...]:
        return (Detected(name="nvml", usable=False, reason=f"NVML finds no GPU 0: {error}"),)

    assert why_no_energy(nvml("Driver Not Loaded")) == "no power sensor on this machine"
    assert why_no_energy(nvml("Insufficient Permissions")).endswith("Insufficient Permissions")
