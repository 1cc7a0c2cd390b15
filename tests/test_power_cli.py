"""`lpvit doctor` and `lpvit power`, as they are typed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from lpvit_edge import doctor as doctor_module
from lpvit_edge import power_cli
from lpvit_edge.doctor import WEAKLY_TYPED, Finding, Status, examine, layer_name, pair_problem
from lpvit_edge.errors import (
    EnvironmentUnfitError,
    FileFormatError,
    LpvitEdgeError,
    UnknownOptionError,
)
from lpvit_profilers.base import STUCK, PowerSource
from lpvit_profilers.jetson_sysfs import JetsonSysfsSource

SYSFS = Path(__file__).parent / "fixtures" / "sysfs"
OFF: dict[str, Any] = {
    "name": "board",
    "sensor": "a recording",
    "scope": "rail",
    "quality": "measured",
    "total_rule": None,
    "rails": [],
    "resolution_mw": None,
    "period_s": 0.1,
    "averaging_s": 0.0,
    "has_counter": False,
    "gain_class": None,
}
LINE = "01-02-2030 03:04:{0:02d} RAM 1/2MB VDD_IN {1}mW/1mW VDD_SOC 1000mW/1mW"


class Result(NamedTuple):
    """What came out of one call."""

    stdout: str
    stderr: str
    exit_code: int | None
    exception: LpvitEdgeError | None


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The two verbs alone, so that no other verb has to be loaded."""
    app = typer.Typer()
    power_cli.register(app)

    def invoke(*arguments: str) -> Result:
        code, raised = None, None
        try:
            app(list(arguments))
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else None
        except LpvitEdgeError as error:
            raised = error
        captured = capsys.readouterr()
        return Result(captured.out, captured.err, code, raised)

    return invoke


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "boot.log"
    path.write_text("\n".join(LINE.format(n, 4000 + 1000 * n) for n in range(3)) + "\n")
    return path


@pytest.fixture
def no_sensor(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> PowerSource:
        raise EnvironmentUnfitError("absent in this test")

    for name in ("JetsonSysfsSource", "TegrastatsSource", "NvmlSource", "RaplSource"):
        monkeypatch.setattr(f"lpvit_profilers.detect.{name}", absent)


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lpvit_profilers.detect.JetsonSysfsSource",
        lambda _: JetsonSysfsSource(SYSFS / "orin_nano"),
    )


@pytest.mark.parametrize("verb", ["doctor", "power"])
def test_help_shows_an_example(run: Run, verb: str) -> None:
    assert f"Example: lpvit {verb}" in run(verb, "--help").stdout


def test_power_replays_a_log_rail_by_rail(run: Run, log: Path) -> None:
    document = json.loads(run("power", "--replay", str(log), "--json").stdout)
    assert document["schema"] == "lpvit.power/1"
    assert document["source"] == "replay of tegrastats"
    assert (document["scope"], document["quality"]) == ("module_input", "measured")
    assert document["total"] == {
        "name": "total",
        "samples": 3,
        "last_mw": 6000.0,
        "mean_mw": 5000.0,
        "min_mw": 4000.0,
        "max_mw": 6000.0,
    }
    assert [rail["name"] for rail in document["rails"]] == ["VDD_IN", "VDD_SOC"]
    assert document["duration_s"] == 2.0
    assert document["energy_mj"] == 10_000.0


def test_a_gap_in_a_log_leaves_the_energy_unknown(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "boot.log"
    lines = [LINE.format(n, 4000) for n in range(12)]
    lines[3:9] = ["a line without rails"] * 6
    path.write_text("\n".join(lines))
    document = json.loads(run("power", "--replay", str(path), "--json").stdout)
    assert (document["samples"], document["duration_s"]) == (6, 11.0)
    assert document["energy_mj"] is None


def test_a_reading_that_never_moves_is_suspect(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "stuck.log"

    def shown(readings: list[int]) -> tuple[str, str | None]:
        path.write_text("\n".join(LINE.format(n, mw) for n, mw in enumerate(readings)))
        document = json.loads(run("power", "--replay", str(path), "--json").stdout)
        return document["quality"], document["reason"]

    assert shown([4000] * 20) == ("suspect", STUCK)
    assert shown([4000] * 19) == ("measured", None)  # too few to tell
    assert shown([4000] * 19 + [4040]) == ("measured", None)


def test_an_estimate_that_never_moves_stays_an_estimate(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "estimate.jsonl"
    info = {**OFF, "name": "estimate", "quality": "estimated", "rails": ["CPU (estimated)"]}
    header = {"kind": "power-recording", "format": 1, "info": info}
    readings = (
        {
            "t_ns": n * 100_000_000,
            "rails_mw": {"CPU (estimated)": 6500.0},
            "total_mw": 6500.0,
            "quality": "estimated",
        }
        for n in range(25)
    )
    path.write_text("\n".join(json.dumps(line) for line in (header, *readings)))
    document = json.loads(run("power", "--replay", str(path), "--json").stdout)
    assert (document["samples"], document["quality"], document["reason"]) == (25, "estimated", None)


def test_power_prints_a_table_of_at_most_80_columns(run: Run, log: Path) -> None:
    result = run("power", "--replay", str(log))
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert "total, measured" in result.stdout
    assert "covers module_input" in " ".join(result.stdout.split())


@pytest.mark.usefixtures("orin")
def test_power_reads_the_sensor_and_can_keep_what_it_read(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "idle.jsonl"
    result = run("power", "--seconds", "0.2", "--json", "--record", str(kept))
    document = json.loads(result.stdout)
    assert document["source"] == "jetson-sysfs"
    assert document["total"]["mean_mw"] == pytest.approx(9250.304)
    assert "reading jetson-sysfs" in result.stderr
    again = json.loads(run("power", "--replay", str(kept), "--json").stdout)
    assert again["source"] == "replay of jetson-sysfs"
    assert again["total"] == document["total"]


def test_power_exits_with_3_when_every_reading_failed(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "off.jsonl"
    path.write_text(
        json.dumps({"kind": "power-recording", "format": 1, "info": OFF})
        + '\n{"t_ns":1,"rails_mw":{},"total_mw":null,"quality":"unavailable","reason":"it is off"}'
    )
    result = run("power", "--replay", str(path), "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert (document["failed"], document["total"], document["reason"]) == (1, None, "it is off")


@pytest.mark.usefixtures("no_sensor")
def test_power_without_a_sensor_ends_with_every_reason(run: Run) -> None:
    result = run("power")
    assert isinstance(result.exception, EnvironmentUnfitError)
    assert result.exception.exit_code == 3
    assert "rapl: absent in this test" in str(result.exception)


@pytest.mark.usefixtures("no_sensor")
def test_an_estimate_needs_a_stated_tdp_and_says_what_it_is(run: Run) -> None:
    document = json.loads(run("power", "--seconds", "0.2", "--tdp-w", "65", "--json").stdout)
    assert (document["source"], document["quality"]) == ("estimate", "estimated")
    assert "a model of the load, not a measurement" in document["notes"]


@pytest.mark.usefixtures("orin")
def test_power_reads_the_source_that_is_named_or_says_why_not(run: Run) -> None:
    read = run("power", "--seconds", "0.1", "--source", "jetson-sysfs", "--json")
    assert json.loads(read.stdout)["source"] == "jetson-sysfs"
    absent = run("power", "--source", "tegrastats").exception
    assert isinstance(absent, EnvironmentUnfitError)
    assert str(absent) == "tegrastats cannot be read here: this is not a Jetson"
    unknown = run("power", "--source", "psychic").exception
    assert isinstance(unknown, UnknownOptionError)
    assert "there are jetson-sysfs, tegrastats, nvml, rapl. The estimate" in str(unknown)


def test_the_estimate_is_no_sensor_that_can_be_named(run: Run) -> None:
    for arguments in (("--source", "estimate"), ("--source", "estimate", "--tdp-w", "65")):
        assert isinstance(run("power", *arguments).exception, UnknownOptionError)
    refused = str(run("power", "--source", "estimate").exception)
    assert "no sensor is called 'estimate'" in refused
    assert "--tdp-w alone asks for it" in refused


@pytest.mark.usefixtures("orin")
def test_an_estimate_never_takes_the_place_of_a_sensor(run: Run) -> None:
    result = run("power", "--seconds", "0.1", "--tdp-w", "65", "--json")
    assert json.loads(result.stdout)["source"] == "jetson-sysfs"
    assert "--tdp-w is not used" in result.stderr


@pytest.mark.parametrize("arguments", [("--tdp-w", "0"), ("--seconds", "-1"), ("--interval", "0")])
def test_senseless_numbers_are_wrong_usage(run: Run, arguments: tuple[str, str]) -> None:
    assert run("power", *arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("--replay", "LOG", "--record", "x.jsonl"),
        ("--replay", "LOG", "--tdp-w", "65"),
        ("--replay", "LOG", "--seconds", "2"),
        ("--replay", "LOG", "--source", "rapl"),
        ("--interval", "0.1"),
        ("--source", "rapl", "--tdp-w", "65"),
    ],
)
def test_an_option_that_would_do_nothing_is_wrong_usage(
    run: Run, log: Path, arguments: tuple[str, ...]
) -> None:
    result = run("power", *(str(log) if text == "LOG" else text for text in arguments))
    assert isinstance(result.exception, UnknownOptionError)
    assert result.exception.exit_code == 2


def test_power_says_why_readings_are_suspect(run: Run, tmp_path: Path) -> None:
    (tmp_path / "boot.log").write_text("POM_5V_GPU 8791/1 POM_5V_IN 3075/1\n" * 2)
    arguments = ("--replay", str(tmp_path / "boot.log"), "--interval", "0.1", "--json")
    document = json.loads(run("power", *arguments).stdout)
    assert document["quality"] == "suspect"
    assert "the rails contradict POM_5V_IN" in document["reason"]


@pytest.mark.usefixtures("orin")
def test_a_recording_that_cannot_be_written_is_refused_in_words(run: Run, tmp_path: Path) -> None:
    result = run("power", "--seconds", "0.1", "--record", str(tmp_path / "none" / "x"))
    assert isinstance(result.exception, FileFormatError)
    assert "cannot be written" in str(result.exception)


@pytest.mark.usefixtures("no_sensor")
def test_doctor_shows_every_source_with_its_reason_in_80_columns(run: Run) -> None:
    result = run("doctor")
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    for name in ("jetson-sysfs", "tegrastats", "nvml", "rapl", "estimate"):
        assert name in result.stdout
    assert "absent in this test" in result.stdout


def test_doctor_prints_one_document(run: Run) -> None:
    document: dict[str, Any] = json.loads(run("doctor", "--json").stdout)
    assert document["schema"] == "lpvit.doctor/1"
    assert document["device"]["machine"]
    assert {finding["status"] for finding in document["findings"]} <= {
        "ok", "optional", "warning", "unfit",
    }  # fmt: skip
    for finding in document["findings"]:
        assert finding["status"] == "ok" or finding["remedy"], finding


def test_a_machine_without_any_engine_is_unfit_and_doctor_exits_with_3(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "installed", lambda _: None)
    result = run("doctor", "--json")
    assert result.exit_code == 3
    unfit = [f["name"] for f in json.loads(result.stdout)["findings"] if f["status"] == "unfit"]
    assert unfit == ["openvino"]


def test_engines_are_those_the_caller_names() -> None:
    report = examine(root=SYSFS / "orin_nano", engines={"mine": ["msgspec"], "other": ["absent-x"]})
    engines = {f.name: (f.status, f.remedy) for f in report.findings if f.area == "engine"}
    assert engines["mine"] == ("ok", None)
    assert engines["other"] == ("optional", "pip install absent-x")


def test_tensorrt_alone_does_not_make_a_machine_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text("Package: libnvinfer10\nVersion: 10.3.0.30-1+cuda12.5\n")
    monkeypatch.setattr(doctor_module, "installed", lambda _: None)
    report = examine(root=tmp_path)
    found = {f.name: f.found for f in report.findings}
    assert found["tensorrt"] == "10.3.0.30 (our engine for it has not run on a device yet)"
    assert found["engine"].startswith("cannot import tensorrt")  # a venv without system packages
    assert not report.is_fit


def test_a_tensorrt_that_builds_makes_a_machine_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(status: Status, found: str = "x") -> tuple[Finding, ...]:
        return (Finding(area="tensorrt", name=layer_name("dense"), status=status, found=found),)

    monkeypatch.setattr(doctor_module, "installed", lambda _: None)
    monkeypatch.setattr(doctor_module, "_tensorrt", lambda _: built("ok"))
    assert examine(root=tmp_path).is_fit
    monkeypatch.setattr(doctor_module, "_tensorrt", lambda _: built("warning"))
    assert not examine(root=tmp_path).is_fit
    monkeypatch.setattr(doctor_module, "_tensorrt", lambda _: built("warning", WEAKLY_TYPED))
    assert examine(root=tmp_path).is_fit


def test_a_small_machine_with_an_old_processor_gets_remedies(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text("flags\t: sse2\nFeatures\t: fp\n")
    (root / "proc/meminfo").write_text("MemTotal: 1000000 kB\n")
    found = {f.name: f for f in examine(root=root).findings}
    assert found["CPU"].status == "warning"
    assert (found["memory"].status, found["memory"].found) == ("warning", "976 MB")


@pytest.mark.parametrize(
    ("torch", "vision", "wanted", "problem"),
    [
        ("2.13.0", "0.28.0", "2.13.0", None),
        ("2.13.0+cpu", "0.28.0+cpu", "2.13.0", None),
        ("2.13.0", None, None, None),
        ("2.13.0", "0.27.0", "2.12.0", "this torchvision was built for torch 2.12.0"),
        (None, "0.28.0", "2.13.0", "torchvision is useless without torch"),
        (
            "2.13.0+cpu",
            "0.28.0",
            "2.13.0",
            "one is a cpu build and the other a default build",
        ),
    ],
)
def test_torch_and_torchvision_must_be_of_one_build(
    torch: str | None, vision: str | None, wanted: str | None, problem: str | None
) -> None:
    assert pair_problem(torch, vision, wanted=wanted) == problem


def test_a_mismatched_pair_makes_the_machine_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0", "torchvision": "0.20.0", "openvino": "1"}
    monkeypatch.setattr(doctor_module, "installed", versions.get)
    monkeypatch.setattr(doctor_module, "_torch_that_vision_wants", lambda: "2.5.0")
    report = examine(root=SYSFS / "orin_nano")
    assert not report.is_fit
    (pair,) = (f for f in report.findings if f.name == "torch pair")
    assert "this torchvision was built for torch 2.5.0" in pair.found
    assert pair.remedy is not None
    assert "constraints.txt" in pair.remedy


def test_the_kernel_is_found_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lpvit_engines"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "lpvit_engines", raising=False)
    assert doctor_module._kernel().status == "warning"
    (package / "_kernel.so").touch()
    assert doctor_module._kernel().found == "_kernel.so"


def test_doctor_runs_without_numpy_or_any_vendor_library(tmp_path: Path) -> None:
    """A device that only runs engines can be examined before anything else is installed."""
    blocked = tmp_path / "torch.py"
    blocked.write_text("raise RuntimeError(f'{__name__} was imported')\n")
    for name in ("numpy", "openvino", "onnxruntime", "torchvision", "tensorrt"):
        shutil.copy(blocked, tmp_path / f"{name}.py")
    root = Path(__file__).parent.parent
    folders = (str(tmp_path), *(str(root / part) for part in (".", "engines", "profilers")))
    done = subprocess.run(
        [sys.executable, "-m", "lpvit_edge", "doctor", "--json"],
        env={"PYTHONPATH": ":".join(folders), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["schema"] == "lpvit.doctor/1"
