"""The command line as a user meets it: another process, its two streams and its exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer.main

from lpvit_edge import files
from lpvit_edge.cli import app
from lpvit_edge.matching import MatchLog
from tests import device_records
from tests.test_boundaries import HEAVY

ROOT = Path(__file__).parent.parent
VERBS = (
    "optimize", "profile", "sensitivity", "allocate", "prune", "finetune", "build", "check",
    "report", "doctor", "power", "dashboard", "install", "run",
)  # fmt: skip
RUN = "from lpvit_edge.cli import main\nsys.exit(main())\n"
WITHOUT_OPTIONAL_LIBRARIES = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(HEAVY)!r}:
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Absent())
"""
# The short times keep the run to seconds. milp, the default, leaves every layer dense where none
# gains, so that a busy machine meets a generous target too; uniform would refuse.
WITH_SHORT_MEASUREMENTS = """
import functools, sys
from lpvit_edge import run_folder
run_folder.Goal = functools.partial(
    run_folder.Goal, profile_seconds=1.0, network_seconds=0.02, check_seconds=0.05
)
"""


def lpvit(*arguments: str | Path, setup: str = "import sys\n") -> subprocess.CompletedProcess[str]:
    """Run one command in a process of its own, with lines wide enough not to be wrapped."""
    environment = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers")),
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "TERM": "dumb",
    }
    return subprocess.run(
        [sys.executable, "-c", setup + RUN, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )


def assert_refused(
    done: subprocess.CompletedProcess[str], *, code: int, message: str, lines: int = 1
) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == lines, done.stderr
    assert done.stderr.startswith("lpvit: ")
    assert message in done.stderr


@pytest.fixture(scope="module")
def run(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a whole run with --json, and what it printed on stdout."""
    pytest.importorskip("openvino")
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = lpvit(
        "optimize", tiny_project / "model.toml", "--out", folder, "--target-latency", "50x",
        "--images", "24", "--threads", "1", "--patterns", "64x1,16x16",
        "--no-curve", "--json", setup=WITH_SHORT_MEASUREMENTS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_verbs_are_those_listed_here() -> None:
    assert set(typer.main.get_command(app).commands) == set(VERBS)  # type: ignore[attr-defined]


def test_help_lists_the_verbs_without_any_optional_library() -> None:
    done = lpvit("--help", setup=WITHOUT_OPTIONAL_LIBRARIES)
    assert done.returncode == 0, done.stderr
    assert "Measure this device" in done.stdout
    for verb in VERBS:
        assert re.search(rf"^\W*{verb}\s+\w", done.stdout, flags=re.MULTILINE), verb


def test_the_wrapper_does_hide_the_optional_libraries() -> None:
    done = lpvit(setup=f"{WITHOUT_OPTIONAL_LIBRARIES}import torch.nn\n")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: torch is not installed"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_shows_an_example_without_any_optional_library(verb: str) -> None:
    done = lpvit(verb, "--help", setup=WITHOUT_OPTIONAL_LIBRARIES)
    assert done.returncode == 0, done.stderr
    assert f"Example: lpvit {verb} " in done.stdout


def test_json_prints_one_document_and_it_is_optimize_json(run: tuple[Path, str]) -> None:
    folder, printed = run
    document = json.loads(printed)  # refuses anything before or after the document
    assert document["schema"] == "lpvit.optimize/1"
    assert document == json.loads((folder / "optimize.json").read_text(encoding="utf-8"))


def test_an_unreachable_target_ends_in_4_and_says_what_is_reachable(run: tuple[Path, str]) -> None:
    folder, _ = run
    before = (folder / "allocation.json").read_bytes()
    done = lpvit("allocate", folder, "--target-latency", "0.001x")
    assert_refused(done, code=4, message="ms is the best that is reachable")
    assert (folder / "allocation.json").read_bytes() == before


def test_an_unknown_allocator_ends_in_2_and_names_the_known(run: tuple[Path, str]) -> None:
    done = lpvit("allocate", run[0], "--allocator", "magic")
    assert_refused(done, code=2, message="'magic'; choose one of milp, slope, uniform")


def test_optimize_refuses_an_unknown_allocator_before_it_makes_anything(
    tiny_project: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = lpvit(
        "optimize", tiny_project / "model.toml", "--out", folder, "--allocator", "magic",
        setup=WITH_SHORT_MEASUREMENTS,
    )  # fmt: skip
    assert_refused(done, code=2, message="'magic'; choose one of milp, slope, uniform")
    assert not (folder / "run.json").exists()


def test_a_missing_model_file_ends_in_1_with_one_line(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    missing = tmp_path / "absent.toml"
    done = lpvit("optimize", missing, "--out", tmp_path / "run")
    assert_refused(done, code=1, message=str(missing))


def test_a_missing_record_ends_in_1_with_one_line(tmp_path: Path) -> None:
    done = lpvit("allocate", tmp_path)
    assert_refused(done, code=1, message=str(tmp_path / "device_profile.json"))


def test_allocate_needs_no_torch_and_prints_a_table_within_100_columns(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    files.save(device_records.profile(), tmp_path / "device_profile.json")
    files.save(device_records.curves(), tmp_path / "sensitivity.json")
    without_torch = WITHOUT_OPTIONAL_LIBRARIES.replace("'scipy', ", "")
    done = lpvit("allocate", tmp_path, "--max-power", "5.4W", setup=without_torch)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 100
    assert re.search(r"blocks\.0\.fc1 .* 32x32 .* \d+ % .* 2\.0000", done.stdout)
    assert re.search(r"mean power 5\.\d+ W \(dense .*, limit 5\.400 W, binds", done.stdout)
    printed = lpvit("allocate", tmp_path, "--target-macs", "0.5x", "--json")
    document = json.loads(printed.stdout)
    assert document["schema"] == "lpvit.allocate/1"
    assert document["bound"] == ["macs"]
    assert document["macs"] <= 0.5 * document["dense_macs"]


def test_a_limit_of_energy_without_a_sensor_ends_in_6(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    none = device_records.profile(quality="unavailable", reason="no power sensor")
    files.save(none, tmp_path / "device_profile.json")
    files.save(device_records.curves(), tmp_path / "sensitivity.json")
    done = lpvit("allocate", tmp_path, "--target-energy", "40mJ")
    assert_refused(done, code=6, message="energies are unavailable (no power sensor)")


def test_a_floor_that_the_images_cannot_prove_ends_in_5_before_anything_is_measured(
    tiny_project: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    done = lpvit(
        "optimize", tiny_project / "model.toml", "--out", tmp_path / "run", "--images", "24",
        "--patterns", "64x1", "--max-drop", "1.0",
    )  # fmt: skip
    assert_refused(
        done, code=5, message="12 held-out images cannot prove a drop of at most 1 points"
    )
    assert not (tmp_path / "run/device_profile.json").exists()


def test_the_steps_go_from_files_to_files_one_after_the_other(
    run: tuple[Path, str], tiny_project: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    from lpvit_edge.records import DeviceProfile
    from tests.test_floor import forms_of

    measured = files.load(DeviceProfile, run[0] / "device_profile.json")
    gemms = tuple(forms_of(measured.layers, ("64x1", "16x16")))  # as if every form gained
    gaining = msgspec.structs.replace(measured, gemms=gemms)
    files.save(gaining, tmp_path / "device_profile.json")
    model = tiny_project / "model.toml"
    common = (model, "--out", tmp_path)
    steps: tuple[tuple[str | Path, ...], ...] = (
        ("sensitivity", *common, "--images", "24", "--patterns", "64x1,16x16"),
        ("allocate", tmp_path, "--target-macs", "0.5x"),
        ("prune", *common, "--images", "24", "--reorder"),
        ("finetune", *common, "--epochs", "1", "--batch", "8"),
    )
    said: dict[str, dict[str, Any]] = {}
    for step in steps:
        done = lpvit(*step, "--json")
        assert done.returncode == 0, done.stderr
        said[str(step[0])] = json.loads(done.stdout)
        assert said[str(step[0])]["schema"] == f"lpvit.{step[0]}/1"
    assert said["prune"]["method"] == "obs, repair on, rotated, reordered"
    tuned = said["finetune"]
    assert tuned["masked_weights"] > 0
    assert tuned["model_sha256"] == files.sha256_of(tmp_path / "model.safetensors")


def test_prune_matches_outputs_if_asked_and_says_what_that_did(
    tiny_project: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    from tests.test_finetune import allocation_for
    from tests.test_optimize import make_job

    job = make_job(tiny_project, tmp_path)
    files.save(allocation_for(job), tmp_path / "allocation.json")
    model = tiny_project / "model.toml"
    done = lpvit("prune", model, "--out", tmp_path, "--images", "24", "--match-outputs")
    assert done.returncode == 0, done.stderr
    *table, weights, matched = done.stdout.splitlines()
    assert [line.split()[0] for line in table[-8:]] == [layer.name for layer in job.walk.layers]
    assert weights.endswith("8 layers pruned and repaired (obs, repair on, outputs matched)")
    log = files.load(MatchLog, tmp_path / "matching.json")
    assert f"{log.loss_after:.4f} after {log.kept_step} of 300 steps" in matched
    assert log.loss_after <= log.loss_before
    assert log.model_sha256 == files.sha256_of(tmp_path / "model.safetensors")


def test_a_model_that_64_rows_do_not_divide_is_pruned_in_the_pattern_allocated(
    tiny_project: Path, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    from tests.test_finetune import allocation_for
    from tests.test_optimize import make_job

    for split in ("calibration", "heldout"):
        (tmp_path / split).symlink_to(tiny_project / split)
    text = (tiny_project / "model.toml").read_text(encoding="utf-8")
    narrow = text.replace("embed_dim = 64", "embed_dim = 40")
    (tmp_path / "model.toml").write_text(narrow, encoding="utf-8")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 40, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments)
    safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    allocated = allocation_for(make_job(tmp_path, tmp_path, patterns=("8x1",)))
    chosen = tuple(
        msgspec.structs.replace(choice, pattern="8x1", sparsity=0.5) for choice in allocated.choices
    )
    files.save(msgspec.structs.replace(allocated, choices=chosen), tmp_path / "allocation.json")
    done = lpvit("prune", tmp_path / "model.toml", "--out", tmp_path, "--images", "24")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: 8 layers pruned and repaired" in done.stdout


@pytest.mark.parametrize("verb", ["build", "check"])
def test_build_and_check_take_as_many_calibration_images_as_optimize(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few of them `check` left no drift reference, and then both were refused."""
    from typer.testing import CliRunner

    from lpvit_edge import options

    fixture = ROOT / "tests" / "fixtures" / "records" / "allocation.2.json"
    (tmp_path / "allocation.json").write_bytes(fixture.read_bytes())
    asked: list[int] = []

    def job(*arguments: Any) -> None:
        asked.append(arguments[5])
        raise typer.Exit(0)

    monkeypatch.setattr(options, "job", job)
    done = CliRunner().invoke(app, [verb, "model.toml", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert asked == [options.IMAGES]
