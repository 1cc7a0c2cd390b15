"""The verbs install and run --store, as processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lpvit_edge import files
from lpvit_edge.bundle import Bundle
from lpvit_edge.dense_bundle import DENSE_REFERENCE, dense_bundle
from lpvit_edge.drift.reference import (
    ReferenceNote,
    Seen,
    build_reference,
    load_reference,
    save_reference,
    softmax,
)
from lpvit_edge.errors import FileFormatError, MismatchError
from lpvit_edge.records import Check
from lpvit_edge.store import BundleStore
from tests.line_bundle import make_bundle, write_image
from tests.test_line import ROOT

CHECK = ROOT / "tests" / "fixtures" / "records" / "check.2.json"


def lpvit(*arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    return subprocess.run(
        [sys.executable, "-m", "lpvit_edge", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def run_folder(tmp_path: Path) -> Bundle:
    """A bundle with the dense.onnx and the check that `optimize` leaves beside it."""
    bundle = make_bundle(tmp_path / "runs" / "demo")
    bundle.path("dense.onnx").write_bytes(b"dense network")
    check = files.load(Check, CHECK)
    digest = files.sha256_of(bundle.path("dense.onnx"))
    files.save(msgspec.structs.replace(check, dense_onnx_sha256=digest), bundle.path("check.json"))
    return bundle


def test_install_and_run_from_the_store_with_a_bundle_that_fails_beside_it(
    run_folder: Bundle, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    done = lpvit("install", run_folder.folder, "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["schema"], document["version"]) == ("lpvit.install/1", run_folder.version)
    bad = make_bundle(tmp_path / "x" / "bad", network=b"bad", classes=2)
    refused = lpvit("install", bad.folder, "--store", store)
    assert refused.returncode == 1
    assert "golden frames get the class" in refused.stderr
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", 3)
    ran = lpvit(
        "run", "--store", store, "--source", f"folder:{tmp_path / 'in'}", "--policy", "wait",
        "--state", tmp_path / "state", "--seconds", "1", "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["ok"] == 1


def test_run_wants_a_bundle_or_a_store_and_not_both(tmp_path: Path) -> None:
    done = lpvit("run", tmp_path, "--store", tmp_path, "--source", f"folder:{tmp_path}")
    assert done.returncode == 2
    assert "either a BUNDLE or --store" in done.stderr


def test_the_dense_network_of_a_run_becomes_a_bundle_of_its_own(
    run_folder: Bundle, tmp_path: Path
) -> None:
    store = BundleStore(tmp_path / "store")
    with dense_bundle(run_folder.folder) as folder:
        installed = store.install(folder, lambda bundle: None, role="dense")
    assert installed.path("model.onnx").read_bytes() == b"dense network"
    assert (installed.labels, installed.version != run_folder.version) == (run_folder.labels, True)
    assert store.path("current") is None


def test_the_dense_bundle_is_watched_with_the_reference_that_the_check_left_for_it(
    run_folder: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with dense_bundle(run_folder.folder) as folder:
        assert not (folder / "reference.json").exists()
    assert "drift is not watched while the dense engine runs" in capsys.readouterr().err
    digest = files.sha256_of(run_folder.path("dense.onnx"))
    note = dense_reference(run_folder.folder, onnx_sha256=digest)
    store = BundleStore(tmp_path / "store")
    with dense_bundle(run_folder.folder) as folder:
        installed = store.install(folder, lambda bundle: None, role="dense")
    assert load_reference(installed.folder)[1] == note
    dense_reference(run_folder.folder, onnx_sha256="0" * 64)
    with (
        pytest.raises(MismatchError, match=r"dense_reference\.json: not about"),
        dense_bundle(run_folder.folder),
    ):
        pass


def dense_reference(folder: Path, *, onnx_sha256: str) -> ReferenceNote:
    rng = np.random.default_rng(0)
    seen = [
        Seen(
            features=rng.normal(size=(60, 3)).astype(np.float32),
            probabilities=softmax(rng.normal(size=(60, 3))),
            statistics=rng.random((60, 5), np.float32),
        )
        for _ in range(2)
    ]
    reference, shrinkage = build_reference(*seen)
    return save_reference(
        reference, folder, onnx_sha256=onnx_sha256, engine="fake", images=(60, 60),
        shrinkage=shrinkage, name=DENSE_REFERENCE,
    )  # fmt: skip


def test_a_dense_network_that_nobody_checked_is_refused(run_folder: Bundle) -> None:
    run_folder.path("dense.onnx").write_bytes(b"another")
    with pytest.raises(MismatchError, match="lpvit check"), dense_bundle(run_folder.folder):
        pass
    run_folder.path("dense.onnx").unlink()
    with pytest.raises(FileFormatError, match=r"dense\.onnx"), dense_bundle(run_folder.folder):
        pass
