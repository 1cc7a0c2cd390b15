"""`lpvit profile`, as it is typed; what it measures is tested elsewhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from lpvit_edge import options, profile_cli
from tests import device_records

Run = Callable[..., str]
FOUND = msgspec.structs.replace(
    device_records.profile(quality="unavailable", reason="no power sensor can be read here"),
    mixed_error=-0.031,
    reasons=("layers in 64x1 took 1.60 times in a network what they take alone",),
)


@pytest.fixture
def asked() -> dict[str, Any]:
    return {}


@pytest.fixture
def run(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """The verb alone, with a profile that was made before."""

    def found(_: object, **given: Any) -> object:
        asked.update(given)
        return FOUND

    monkeypatch.setattr("lpvit_edge.device_profile.profile_device", found)
    monkeypatch.setattr(options, "job_without_images", lambda *_: None)
    app = typer.Typer()
    profile_cli.register(app)

    def invoke(*arguments: str, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ending:
            app(["model.toml", *arguments])
        assert (ending.value.code or 0) == code
        return capsys.readouterr().out

    return invoke


def test_the_lines_say_what_is_doubted_and_why_there_is_no_energy(run: Run) -> None:
    lines = run("--out", "x.json").splitlines()
    assert lines[0].startswith("x.json: 18 forms, dense 7.000 ms")
    assert lines[1:] == [
        "energy: no power sensor can be read here",
        "a network of mixed forms was predicted -3.1% off",
        "may not be trusted because layers in 64x1 took 1.60 times in a network what they take "
        "alone",
    ]


def test_json_is_one_document_with_a_schema(run: Run) -> None:
    document = json.loads(run("--json"))
    assert document.pop("schema") == "lpvit.profile/1"
    assert document == json.loads(msgspec.json.encode(FOUND))


def test_a_budget_and_a_file_are_passed_on(run: Run, asked: dict[str, Any]) -> None:
    run("--budget", "5m", "--out", "runs/a", "--tdp-w", "65")
    assert asked == {"seconds": 300.0, "path": Path("runs/a/device_profile.json"), "tdp_w": 65.0}


@pytest.mark.parametrize("tdp_w", ["0", "5000", "nan"])
def test_a_senseless_tdp_is_wrong_usage_and_measures_nothing(
    run: Run, asked: dict[str, Any], tdp_w: str
) -> None:
    run("--tdp-w", tdp_w, code=2)
    assert asked == {}


def test_help_shows_an_example(run: Run) -> None:
    assert "Example: lpvit profile" in run("--help")
