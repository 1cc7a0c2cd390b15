"""A red drift alarm of a running line: the denser bundle takes over, and everybody is told."""

import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lpvit_edge import files
from lpvit_edge.bundle import Bundle
from lpvit_edge.drift.monitor import RetrainRequest
from lpvit_edge.drift.reference import build_reference, gather, save_reference
from lpvit_edge.errors import FileFormatError
from lpvit_edge.images import preprocessed
from lpvit_edge.line.bundles import Bundles, OneBundle
from lpvit_edge.line.config import line_config
from lpvit_edge.line.line import Line
from lpvit_edge.line.stored_bundles import StoredBundles
from lpvit_edge.line.watched import watch_drift, watched
from lpvit_edge.store import BundleStore
from lpvit_engines.fake import FakeEngine
from tests.line_bundle import PREPROCESS, make_bundle
from tests.test_install import lpvit
from tests.test_line import events_of, folder_config, run_until
from tests.test_store import prove


def pictures(count: int, seed: int, *, level: float) -> "list[np.ndarray[Any, Any]]":
    rng = np.random.default_rng(seed)
    noisy = (
        level + 20 * rng.standard_normal((count, 12, 16, 3)) + rng.normal(0, 6, (count, 1, 1, 3))
    )
    return [image.clip(0, 255).astype(np.uint8) for image in noisy]


@pytest.fixture
def watched_bundle(tmp_path: Path) -> Bundle:
    """A bundle with a drift reference of grey pictures."""
    bundle = make_bundle(tmp_path / "a" / "pruned", network=b"pruned")
    with FakeEngine(bundle.path("model.onnx")) as engine:
        seen = [
            gather(
                (image, engine.infer_all(preprocessed(image, PREPROCESS)[None]))
                for image in pictures(300, seed, level=100)
            )
            for seed in (1, 2)
        ]
    reference, shrinkage = build_reference(*seen)
    save_reference(
        reference,
        bundle.folder,
        onnx_sha256=bundle.manifest.onnx_sha256,
        engine="fake",
        images=(300, 300),
        shrinkage=shrinkage,
    )
    return bundle


def put(folder: Path, images: "list[np.ndarray[Any, Any]]", *, name: str) -> None:
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{name}{number:04d}.png")


def run_into_drift(bundles: Bundles, tmp_path: Path) -> tuple[Line, list[dict[str, Any]], str]:
    """The line after it fell back or said why it cannot, its events, and the page's /metrics."""
    settings = folder_config(tmp_path, drift={"sample": 5})
    bundle = bundles.begin()
    put(tmp_path / "in", pictures(200, 3, level=200), name="strange")
    with watched(bundle, settings, bind=None, token=None) as hub:
        assert hub is not None
        line = Line(bundle, settings, hub=hub)
        watch_drift(hub, line, bundles)
        line.start()

        def settled() -> bool:
            bundles.look(line)
            return any(e["kind"] == "bundle" for e in events_of(line))

        run_until(line, lambda: settled() and line.summary().frames == 200)
        events, now = events_of(line), hub.now()
        line.close()
    assert [event.kind for event in now.events] == [event["kind"] for event in events]
    return line, events, (now.engine or {}).get("model", "")


def test_red_falls_back_to_the_dense_bundle_and_stays_there_after_a_restart(
    watched_bundle: Bundle, tmp_path: Path
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    dense = make_bundle(tmp_path / "b" / "dense", network=b"dense")
    store.install(dense.folder, prove, role="dense")
    line, events, shown = run_into_drift(StoredBundles(store), tmp_path)
    assert line.bundle.version == dense.version == shown
    assert [e["severity"] for e in events if e["kind"] == "drift"] == ["warning", "alarm"]
    assert any("took over: red drift alarm" in e["text"] for e in events)
    (request,) = (tmp_path / "state" / "drift").glob("drift-*/retrain.json")
    assert files.load(RetrainRequest, request).bundle == watched_bundle.version
    after = StoredBundles(store)
    assert after.begin().version == dense.version
    assert "the denser bundle runs: red drift alarm" in after.told[0][0]
    store.install(watched_bundle.folder, prove)  # what ends it
    assert StoredBundles(store).begin().version == watched_bundle.version


def test_the_bundle_that_a_red_alarm_left_comes_back_when_it_is_installed_again(
    watched_bundle: Bundle, tmp_path: Path
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    dense = make_bundle(tmp_path / "b" / "dense", network=b"dense")
    store.install(dense.folder, prove, role="dense")
    bundles = StoredBundles(store)
    line = Line(bundles.begin(), folder_config(tmp_path))
    line.start()

    def runs(version: str) -> bool:
        bundles.look(line)
        return line.bundle.version == version

    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    run_until(line, lambda: runs(dense.version))
    store.install(watched_bundle.folder, prove)  # the lamp was mended
    run_until(line, lambda: runs(watched_bundle.version))
    line.close()
    assert store.record().on_dense is None


def test_red_falls_back_to_the_bundle_that_the_rules_name(
    watched_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_bundle(tmp_path / "b" / "dense", network=b"dense")
    bundles = OneBundle(watched_bundle.folder, fallback=dense.folder)
    line, _, _ = run_into_drift(bundles, tmp_path)
    assert line.bundle.version == dense.version
    offered: list[object] = []
    monkeypatch.setattr(line.swap, "offer", lambda *offer: offered.append(offer))
    bundles.fall_back(line, "red again, from the dense engine's own reference", of=line.bundle)
    bundles.look(line)
    assert not offered


def test_red_without_a_denser_bundle_is_told_and_the_line_goes_on(
    watched_bundle: Bundle, tmp_path: Path
) -> None:
    line, events, _ = run_into_drift(OneBundle(watched_bundle.folder), tmp_path)
    assert line.bundle.version == watched_bundle.version
    assert any("no denser bundle to fall back on" in e["text"] for e in events)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"fallback": "x", "fall_back": False}, "never runs it"),
        ({"red_at": 10.0, "yellow_at": 100.0}, "red needs at least as much evidence"),
        ({"fall_bck": True}, r"fall_bck.*\$\.drift"),
        ({"yellow_at": 0.5}, r"> 1.*\$\.drift\.yellow_at"),
        ({"fallback": ""}, r"\$\.drift\.fallback"),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rules: dict[str, Any], message: str) -> None:
    source = {"kind": "folder", "target": "x"}
    with pytest.raises(FileFormatError, match=message):
        line_config({"source": source, "drift": rules}, name="line.toml")


def test_a_fallback_that_is_no_bundle_is_refused_at_the_start(
    watched_bundle: Bundle, tmp_path: Path
) -> None:
    toml = tmp_path / "line.toml"
    toml.write_text(f'[drift]\nfallback = "{tmp_path / "nowhere"}"\n')
    options = ("--config", toml, "--source", f"folder:{tmp_path}", "--state", tmp_path / "state")
    done: subprocess.CompletedProcess[str] = lpvit("run", watched_bundle.folder, *options)
    assert done.returncode == 1
    assert "nowhere/bundle.json: no such file" in done.stderr
    stored = lpvit("run", "--store", tmp_path, *options)
    assert stored.returncode == 2
    assert "with --store the denser bundle is the store's" in stored.stderr


def test_a_line_does_not_wait_for_the_note_that_it_fell_back(
    watched_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    dense = make_bundle(tmp_path / "b" / "dense", network=b"dense")
    store.install(dense.folder, prove, role="dense")
    bundles = StoredBundles(store)
    line = Line(bundles.begin(), folder_config(tmp_path))
    line.start()
    release = threading.Event()
    monkeypatch.setattr(store, "note_dense", lambda name, reason: release.wait(15.0))
    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    bundles.look(line)
    run_until(line, lambda: line.bundle.version == dense.version)
    put(tmp_path / "in", pictures(1, 3, level=100), name="part")
    run_until(line, lambda: line.summary().frames == 1)
    assert not release.is_set()
    release.set()
    line.close()


def test_a_store_that_cannot_be_read_is_told_and_ends_no_thread(
    watched_bundle: Bundle, tmp_path: Path
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    bundles = StoredBundles(store)
    line = Line(bundles.begin(), folder_config(tmp_path))
    (store.folder / "store.json").write_text("{")
    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    (event,) = (event for event in events_of(line) if event["kind"] == "bundle")
    assert event["severity"] == "alarm"
    assert "no way back to a denser bundle" in event["text"]
    line.close()
