"""A line that starts on its dense bundle: that one may fail too, and then it is left."""

from pathlib import Path

import pytest

from lpvit_edge import files
from lpvit_edge.bundle import Bundle
from lpvit_edge.line.line import Line
from lpvit_edge.line.stored_bundles import StoredBundles
from lpvit_edge.store import BundleStore
from tests.line_bundle import make_bundle
from tests.test_line import events_of, folder_config
from tests.test_store import prove, started


@pytest.fixture
def dense(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "d" / "dense", network=b"dense")


@pytest.fixture
def store(dense: Bundle, tmp_path: Path) -> BundleStore:
    """A bundle that a red alarm left for the dense one."""
    found = BundleStore(tmp_path / "store")
    pruned = found.install(make_bundle(tmp_path / "a" / "b", network=b"pruned").folder, prove)
    found.install(dense.folder, prove, role="dense")
    assert found.note_dense(pruned.folder.name, "red drift alarm")
    return found


def test_a_damaged_dense_bundle_is_left_for_the_current_one(store: BundleStore) -> None:
    store.open("dense").path("model.onnx").write_bytes(b"bit rot")
    bundles = StoredBundles(store)
    assert bundles.begin().version == store.open("current").version
    assert [severity for _, severity in bundles.told] == ["alarm"]
    assert "back from the denser bundle to the current one" in bundles.told[0][0]
    assert store.record().on_dense is None


def test_a_dense_bundle_that_fails_its_warm_up_leaves_current_and_previous_alone(
    store: BundleStore, dense: Bundle
) -> None:
    current = store.open("current").version
    bundles = StoredBundles(store)
    assert bundles.begin().version == dense.version
    assert bundles.go_back("0 of 1 golden frames get the class")
    assert bundles.begin().version == current
    assert store.open("current").version == current


def test_three_starts_of_the_dense_bundle_without_a_verdict_lead_back_to_the_current_one(
    store: BundleStore, dense: Bundle
) -> None:
    for _ in range(3):  # each is killed, as one that is too large for the memory
        assert started(store) == dense.version
    assert started(store) == store.open("current").version


def test_a_full_disk_does_not_lead_to_the_same_dense_bundle_again(
    store: BundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomic", full)
    bundles = StoredBundles(store)
    bundles.begin()
    assert bundles.go_back("0 of 1 golden frames get the class")
    assert bundles.begin().version == store.open("current").version


def test_red_does_not_lead_back_to_a_dense_bundle_that_failed_until_it_is_installed_again(
    store: BundleStore, dense: Bundle, tmp_path: Path
) -> None:
    bundles = StoredBundles(store)
    bundles.begin()
    bundles.go_back("it was killed")
    line = Line(bundles.begin(), folder_config(tmp_path))
    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    bundles.look(line)
    (event,) = events_of(line)
    assert event["text"] == "no way back to the denser bundle, it failed: it was killed"
    store.install(dense.folder, prove, role="dense")
    bundles.fall_back(line, "red drift alarm", of=line.bundle)
    bundles.look(line)
    assert line.swap._working is not None
    line.close()
