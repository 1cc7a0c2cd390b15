"""Two processes (gloo, loopback) come to the same statistics, weights and answers as one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("accelerate")
pytest.importorskip("timm")
pytest.importorskip("openvino")

from safetensors.torch import load_file

from lpvit_edge import distributed, files
from lpvit_edge.errors import DataError, UnknownOptionError
from lpvit_edge.recipe import FinetuneLog
from lpvit_edge.records import PruneLog, Sensitivity
from tests.conftest import write_images
from tests.shared_work import work

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folders(tiny_project: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What one process left, and what two left."""
    base = tmp_path_factory.mktemp("distributed")
    project, one, two = base / "project", base / "one", base / "two"
    shutil.copytree(tiny_project, project)
    for split, seed, count in (("calibration", 3, 32), ("heldout", 4, 20)):
        shutil.rmtree(project / split)
        write_images(project / split, seed=seed, per_class=count)
    (project / "heldout/ok/000.png").write_text("no image")
    one.mkdir()
    two.mkdir()
    work(project, one)
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
            "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
            "--main_process_ip=127.0.0.1", "--main_process_port=0",
            str(ROOT / "tests/shared_work.py"), str(project), str(two),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / n) for n in (".", "engines", "profilers")),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("prune: layers") >= 1
    return one, two


def test_the_curves_are_the_same(folders: tuple[Path, Path]) -> None:
    one, two = (files.load(Sensitivity, folder / "sensitivity.json") for folder in folders)
    assert (one.images, one.images_sha256) == (two.images, two.images_sha256)
    for a, b in zip(one.curves, two.curves, strict=True):
        assert (a.layer, a.pattern, a.criterion) == (b.layer, b.pattern, b.criterion)
        # Sums are added in another order, and the elimination in float32 enlarges that.
        assert b.distortion == pytest.approx(a.distortion, rel=2e-3, abs=1e-9)


def test_the_pruned_weights_are_the_same(folders: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / "pruned.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert bool(((weight == 0) == (two[name] == 0)).all()), name
        np.testing.assert_allclose(two[name], weight, rtol=1e-4, atol=1e-5, err_msg=name)
    logs = [files.load(PruneLog, folder / "prune.json") for folder in folders]
    assert [layer.layer for layer in logs[0].layers] == [layer.layer for layer in logs[1].layers]


def test_every_process_has_all_answers(folders: tuple[Path, Path]) -> None:
    one, two = folders
    expected = np.load(one / "answers.0.npy")
    assert len(expected) == 60
    assert list(expected).count(-1) == 1
    for rank in range(2):
        assert (np.load(two / f"answers.{rank}.npy") == expected).all()


def test_fine_tuning_with_the_same_whole_batch_ends_the_same(folders: tuple[Path, Path]) -> None:
    one, two = (files.load(FinetuneLog, folder / "finetune.json") for folder in folders)
    assert (one.processes, two.processes) == (1, 2)
    assert two.history[0].soft == pytest.approx(one.history[0].soft, rel=1e-3)
    before = load_file(folders[0] / "pruned.safetensors")
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for name, weight in weights[0].items():
        moved = float((weight - before[name]).abs().max())
        # Adam divides small gradients by their size, so that rounding moves single weights.
        assert float((weights[1][name] - weight).abs().mean()) <= 0.05 * moved + 1e-6, name
        assert bool(((weight == 0) == (weights[1][name] == 0)).all()), name


def test_shares_are_neighbours_and_together_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(list(distributed.share(range(7))))
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]


def test_a_process_without_images_and_a_shared_measurement_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distributed.refuse_many("check")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DataError, match="2 batches of calibration images for 3 processes"):
        distributed.refuse_idle(2)
    with pytest.raises(UnknownOptionError, match="lpvit check measures this machine"):
        distributed.refuse_many("check")
