"""Another bundle under a running line: what is offered when, who reads it, and what wins."""

import importlib
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lpvit_edge import files
from lpvit_edge.bundle import Bundle
from lpvit_edge.dashboard.hub import Hub
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.drift.reference import ReferenceNote
from lpvit_edge.line import swap as swap_module
from lpvit_edge.line.bundles import Bundles, OneBundle
from lpvit_edge.line.line import Line
from lpvit_edge.line.stored_bundles import StoredBundles
from lpvit_edge.line.watched import watch_drift
from lpvit_edge.proof import proven_engine
from lpvit_edge.store import BundleStore, StoreRecord
from lpvit_engines.fake import FakeEngine
from tests.line_bundle import make_bundle
from tests.test_fallback import watched_bundle
from tests.test_line import events_of, folder_config, run_until
from tests.test_store import prove

__all__ = ["watched_bundle"]


class Waits:
    """Lets the proofs of a line's bundles begin when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = threading.Event()
        self.threads: list[threading.Thread] = []
        monkeypatch.setattr(swap_module, "proven_engine", self._slow)

    def _slow(self, *args: Any, **options: Any) -> Any:
        self.threads.append(threading.current_thread())
        self.release.wait(15.0)
        return proven_engine(*args, **options)


@pytest.fixture
def dense(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "b" / "dense", network=b"dense")


@pytest.fixture(params=["store", "folder"])
def bundles(
    request: pytest.FixtureRequest,
    watched_bundle: Bundle,
    dense: Bundle,
    tmp_path: Path,
) -> Bundles:
    """A bundle that runs and a denser one, in a store and in folders."""
    if request.param == "folder":
        return OneBundle(watched_bundle.folder, fallback=dense.folder)
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    store.install(dense.folder, prove, role="dense")
    return StoredBundles(store)


def wishes_while_another_is_proven(
    bundles: Bundles, other: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Line:
    """A line that was offered another bundle before the red alarm about the one that runs."""
    line = Line(bundles.begin(), folder_config(tmp_path))
    line.start()
    waits = Waits(monkeypatch)
    assert line.swap.offer(lambda: other, "it was installed")
    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    for _ in range(3):
        bundles.look(line)
    told = bundle_events(line)
    assert told == ["the denser bundle waits until another one is proven: red drift alarm"]
    waits.release.set()
    return line


def line_on(store: BundleStore, tmp_path: Path) -> tuple[StoredBundles, Line]:
    """A line that runs what the store holds."""
    bundles = StoredBundles(store)
    line = Line(bundles.begin(), folder_config(tmp_path))
    line.start()
    return bundles, line


def install_one_that_disagrees(store: BundleStore, tmp_path: Path) -> None:
    """Nobody proved it; the line that is to take it over will refuse it."""
    bad = make_bundle(tmp_path / "c" / "bad", network=b"bad", classes=2)
    store.install(bad.folder, lambda bundle: None)


def bundle_events(line: Line) -> list[str]:
    return [event["text"] for event in events_of(line) if event["kind"] == "bundle"]


def test_a_fall_back_waits_for_another_bundle_and_comes_when_that_one_is_refused(
    bundles: Bundles, dense: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = make_bundle(tmp_path / "c" / "bad", network=b"bad", classes=2)
    line = wishes_while_another_is_proven(bundles, bad, tmp_path, monkeypatch)

    def falls_back() -> bool:
        bundles.look(line)
        return line.bundle.version == dense.version

    run_until(line, falls_back)
    told = bundle_events(line)
    line.close()
    assert any(text.startswith("not taken over (it was installed)") for text in told)
    assert told[-1] == f"{dense.version} took over: red drift alarm"


def test_a_fall_back_from_a_bundle_that_was_left_meanwhile_is_dropped_and_told(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = make_bundle(tmp_path / "c" / "newer", network=b"newer")
    line = wishes_while_another_is_proven(bundles, newer, tmp_path, monkeypatch)
    dropped = f"no denser bundle is needed, {newer.version} took over: red drift alarm"

    def told() -> bool:
        bundles.look(line)
        return dropped in bundle_events(line)

    run_until(line, told)
    bundles.fall_back(line, "red drift alarm", of=bundles.begin())  # a late frame of the old one
    for _ in range(3):
        line.step(0.01)
        bundles.look(line)
    assert line.bundle.version == newer.version
    assert bundle_events(line)[-1] == dropped
    line.close()


def test_another_bundle_is_read_proven_and_closed_outside_the_line_s_own_thread(
    bundles: Bundles, dense: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(bundles.begin(), folder_config(tmp_path))
    line.start()
    busy: list[str] = []

    def noted(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            busy.append(f"{name} in {threading.current_thread().name}")
            return real(*args, **options)

        return call

    for module, name in (
        ("lpvit_edge.bundle", "_refuse_changed"),
        ("lpvit_edge.line.swap", "unpack"),
        ("lpvit_edge.files", "load"),
    ):
        owner = importlib.import_module(module)
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    monkeypatch.setattr(FakeEngine, "close", noted("close", FakeEngine.close))
    hub = Hub(device={}, power=PowerMonitor(None, reason="none"))
    watch_drift(hub, line, bundles)
    busy.clear()
    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    asked = len(busy)  # store.json, in the hub's thread

    def runs() -> bool:
        bundles.look(line)
        return line.bundle.version == dense.version and "close in swap noted" in busy

    monkeypatch.setattr("lpvit_edge.line.stored_bundles._LOOK_S", 1e9)  # at store.json
    run_until(line, runs)
    assert {entry.partition(" in ")[2] for entry in busy[asked:]} == {"swap", "swap noted"}
    assert {"_refuse_changed in swap", "unpack in swap", "load in swap"} <= set(busy)
    line.close()


def test_of_two_bundles_that_are_offered_none_is_lost(
    bundles: Bundles, dense: Bundle, tmp_path: Path
) -> None:
    newer = make_bundle(tmp_path / "c" / "newer", network=b"newer")
    line = Line(bundles.begin(), folder_config(tmp_path))
    line.start()
    assert line.swap.offer(lambda: newer, "it was installed")
    line.swap._working.join(15.0)  # type: ignore[union-attr]
    assert not line.swap.offer(lambda: dense, "red drift alarm")  # until the line has taken it
    line.step(0.01)
    assert line.bundle.version == newer.version
    assert line.swap.offer(lambda: dense, "red drift alarm")
    line.close()


def test_an_installation_during_the_fall_back_is_what_the_next_start_runs(
    watched_bundle: Bundle,
    dense: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    store.install(dense.folder, prove, role="dense")
    bundles, line = line_on(store, tmp_path)
    waits = Waits(monkeypatch)
    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    bundles.look(line)  # the dense bundle is being proven
    newer = make_bundle(tmp_path / "c" / "newer", network=b"newer")
    store.install(newer.folder, prove)
    waits.release.set()

    def runs(version: str) -> bool:
        bundles._looked_s = 0.0
        bundles.look(line)
        return line.bundle.version == version

    run_until(line, lambda: runs(newer.version))
    line.close()
    assert store.record().on_dense is None
    assert StoredBundles(store).begin().version == newer.version


def test_a_bundle_that_is_refused_while_the_next_one_is_installed_takes_no_other_with_it(
    watched_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    bundles, line = line_on(store, tmp_path)
    waits = Waits(monkeypatch)
    install_one_that_disagrees(store, tmp_path)
    bundles._looked_s = 0.0
    bundles.look(line)
    newer = make_bundle(tmp_path / "d" / "newer", network=b"newer")
    store.install(newer.folder, prove)
    waits.release.set()
    run_until(line, lambda: any("not taken over" in text for text in bundle_events(line)))
    line.swap._working.join(15.0)  # type: ignore[union-attr]
    assert store.open("current").version == newer.version
    line.close()


def test_a_line_on_its_dense_bundle_stays_there_when_an_installation_is_refused(
    watched_bundle: Bundle,
    dense: Bundle,
    tmp_path: Path,
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    store.install(dense.folder, prove, role="dense")
    store.note_dense(store.open("current").folder.name, "red drift alarm")
    bundles, line = line_on(store, tmp_path)
    install_one_that_disagrees(store, tmp_path)
    bundles.look(line)
    line.swap._working.join(15.0)  # type: ignore[union-attr]
    line.close()
    assert line.bundle.version == dense.version
    assert store.open("current").version == watched_bundle.version
    assert StoredBundles(store).begin().version == dense.version


def test_a_store_that_cannot_be_read_for_a_while_ends_no_line(
    watched_bundle: Bundle,
    dense: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = BundleStore(tmp_path / "store")
    store.install(watched_bundle.folder, prove)
    bundles, line = line_on(store, tmp_path)
    install_one_that_disagrees(store, tmp_path)
    waits = Waits(monkeypatch)
    bundles.look(line)

    def broken() -> StoreRecord:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(store, "record", broken)
        bundles._looked_s = 0.0
        bundles.look(line)
        waits.release.set()
        line.swap._working.join(15.0)  # type: ignore[union-attr]
    texts = bundle_events(line)
    assert sum("the store cannot be used: [Errno 13]" in text for text in texts) == 2
    assert line.swap.offer(lambda: dense, "red drift alarm")
    line.close()


def test_a_reference_of_another_model_is_not_watched_with(
    watched_bundle: Bundle,
    tmp_path: Path,
) -> None:
    note = files.load(ReferenceNote, watched_bundle.path("reference.json"))
    other = msgspec.structs.replace(note, onnx_sha256="0" * 64)
    files.save(other, watched_bundle.path("reference.json"))
    line = Line(watched_bundle, folder_config(tmp_path))
    hub = Hub(device={}, power=PowerMonitor(None, reason="none"))
    watch_drift(hub, line, OneBundle(watched_bundle.folder))
    (event,) = events_of(line)
    line.close()
    assert hub.watcher is None
    assert event["severity"] == "alarm"
    assert "is about the model 000000000000" in event["text"]
