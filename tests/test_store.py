"""The store of bundles: nothing runs that was not proven, and there is always a way back."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from lpvit_edge import files
from lpvit_edge.bundle import Bundle
from lpvit_edge.crash_loop import Start, failed_starts, forget_starts, note_start
from lpvit_edge.errors import EnvironmentUnfitError, FileFormatError, MismatchError
from lpvit_edge.line.line import Line
from lpvit_edge.line.stored_bundles import StoredBundles
from lpvit_edge.proof import proven_engine
from lpvit_edge.store import BundleStore
from tests.line_bundle import make_bundle, write_image
from tests.test_line import ROOT, events_of, folder_config, run_until


def prove(bundle: Bundle) -> None:
    proven_engine(bundle).close()


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "store")


@pytest.fixture
def both(store: BundleStore, tmp_path: Path) -> tuple[str, str]:
    """Versions of an older and of a newer bundle, both installed."""
    older = store.install(make_bundle(tmp_path / "a" / "b", network=b"older").folder, prove)
    newer = store.install(make_bundle(tmp_path / "c" / "d", network=b"newer").folder, prove)
    return older.version, newer.version


def test_the_one_before_stays_as_previous(store: BundleStore, both: tuple[str, str]) -> None:
    assert (store.open("previous").version, store.open("current").version) == both
    store.install(store.open("current").folder, prove)  # again: nothing changes
    assert (store.open("previous").version, store.open("current").version) == both


def test_a_third_bundle_removes_the_first(
    store: BundleStore, both: tuple[str, str], tmp_path: Path
) -> None:
    store.install(make_bundle(tmp_path / "e" / "f", network=b"newest").folder, prove)
    assert store.open("previous").version == both[1]
    assert len(list((store.folder / "bundles").iterdir())) == 2


def test_a_bundle_that_answers_otherwise_is_not_promoted(
    store: BundleStore, both: tuple[str, str], tmp_path: Path
) -> None:
    before = (store.folder / "store.json").read_bytes()
    other = make_bundle(tmp_path / "e" / "f", network=b"broken", classes=2)
    with pytest.raises(MismatchError, match="golden frames"):
        store.install(other.folder, prove)
    assert (store.folder / "store.json").read_bytes() == before
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "bundles", "install.lock", "lock", "store.json",
    ]  # fmt: skip


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from lpvit_edge.store import BundleStore
def killed(bundle):
    os.kill(os.getpid(), signal.SIGKILL)
BundleStore(Path(sys.argv[1])).install(Path(sys.argv[2]), killed)
"""


def test_an_installation_that_is_killed_leaves_the_old_bundle_and_can_be_repeated(
    store: BundleStore, both: tuple[str, str], tmp_path: Path
) -> None:
    newest = make_bundle(tmp_path / "e" / "f", network=b"newest")
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(store.folder), str(newest.folder)],
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == -9
    assert (store.folder / "incoming").is_dir()
    assert store.open("current").version == both[1]
    assert store.install(newest.folder, prove).version == newest.version
    assert not (store.folder / "incoming").exists()


def test_a_full_disk_installs_nothing(
    store: BundleStore, both: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    newest = make_bundle(tmp_path / "e" / "f", network=b"newest")
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(EnvironmentUnfitError, match=r"No space left.*nothing was installed"):
        store.install(newest.folder, prove)
    assert store.open("current").version == both[1]
    assert not (store.folder / "incoming").exists()


def test_a_store_without_a_bundle_says_how_to_get_one(store: BundleStore) -> None:
    with pytest.raises(FileFormatError, match="lpvit install BUNDLE --store"):
        store.open("current")


def test_a_name_that_leads_out_of_the_store_is_refused(
    store: BundleStore, both: tuple[str, str]
) -> None:
    record = msgspec.structs.replace(store.record(), current="../../etc")
    files.save(record, store.folder / "store.json")
    with pytest.raises(FileFormatError, match="is no bundle's name"):
        store.open("current")


def started(store: BundleStore) -> str:
    bundles = StoredBundles(store)
    version = bundles.begin().version
    bundles.starting()
    return version


def start(seconds: float, *, bundle: str = "a", boot: str = "1", at: float | None = None) -> Start:
    return Start(bundle=bundle, boot=boot, up_s=seconds, at=seconds if at is None else at)


def test_starts_are_counted_by_bundle_and_age_whatever_the_time_of_day_does(tmp_path: Path) -> None:
    path = tmp_path / "starts.json"
    note_start(path, start(0.0))
    note_start(path, start(200.0, at=-1e9))  # the time of day was set back
    assert len(failed_starts(path, start(290.0))) == 2
    assert len(failed_starts(path, start(310.0))) == 1
    assert failed_starts(path, start(290.0, bundle="b")) == ()
    forget_starts(path)
    assert failed_starts(path, start(290.0)) == ()


def test_power_cuts_in_a_row_are_no_crash_loop(tmp_path: Path) -> None:
    path = tmp_path / "starts.json"
    for boot in ("1", "2", "3"):
        note_start(path, start(20.0, boot=boot, at=1000.0 + 40.0 * int(boot)))
    assert failed_starts(path, start(20.0, boot="4", at=1160.0)) == ()
    for seconds in (20.0, 25.0, 30.0):  # while the machine stays up, three are one
        note_start(path, start(seconds, boot="4"))
    assert len(failed_starts(path, start(35.0, boot="4"))) == 3


def test_a_damaged_list_of_starts_does_not_keep_a_line_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "starts.json"
    path.write_bytes(b"\0\0")
    assert failed_starts(path, start(1.0)) == ()


def test_three_starts_without_a_verdict_lead_back_to_the_previous_bundle(
    store: BundleStore, both: tuple[str, str]
) -> None:
    for _ in range(3):  # each is killed before it comes to a verdict
        assert started(store) == both[1]
    fourth = StoredBundles(store)
    assert fourth.begin().version == both[0]
    assert "3 starts within 300 s without a verdict" in fourth.told[0][0]
    fourth.starting()
    for _ in range(2):
        assert started(store) == both[0]
    last = StoredBundles(store)
    assert last.begin().version == both[0]  # the only one that is left is tried on and on
    assert "no previous bundle" in last.told[0][0]


def test_a_damaged_current_bundle_leads_back_at_once(
    store: BundleStore, both: tuple[str, str]
) -> None:
    store.open("current").path("model.onnx").write_bytes(b"bit rot")
    bundles = StoredBundles(store)
    assert bundles.begin().version == both[0]
    assert "content changed" in bundles.told[0][0]
    assert "content changed" in next(iter(store.record().left.values()))


def test_a_current_bundle_on_a_bad_block_leads_back_at_once(
    store: BundleStore, both: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = store.open("current").path("model.onnx")
    sha256_of = files.sha256_of

    def read(path: Path) -> str:
        if path == bad:
            raise OSError(5, "Input/output error")
        return sha256_of(path)

    monkeypatch.setattr(files, "sha256_of", read)
    bundles = StoredBundles(store)
    assert bundles.begin().version == both[0]
    assert "Input/output error" in bundles.told[0][0]


def test_a_store_that_cannot_be_written_still_leads_back(
    store: BundleStore, both: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.open("current").path("model.onnx").write_bytes(b"bit rot")

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_atomic", full)
    bundles = StoredBundles(store)
    assert bundles.begin().version == both[0]
    bundles.starting()
    assert [severity for _, severity in bundles.told] == ["warning", "alarm", "warning"]
    assert store.record().current is not None


def test_a_clean_end_is_no_failed_start(store: BundleStore, both: tuple[str, str]) -> None:
    for _ in range(5):
        bundles = StoredBundles(store)
        assert bundles.begin().version == both[1]
        bundles.starting()
        bundles.end()


def test_a_running_line_takes_over_what_is_installed_and_loses_no_part(
    store: BundleStore, both: tuple[str, str], tmp_path: Path
) -> None:
    bundles = StoredBundles(store)
    line = Line(bundles.begin(), folder_config(tmp_path))
    bundles.starting()
    assert (store.folder / "starts.json").exists()
    line.start()
    newest = make_bundle(tmp_path / "e" / "f", network=b"newest")
    write_image(tmp_path / "in" / "1.png", 1)
    run_until(line, lambda: line.summary().frames == 1)
    bundles.look(line)
    assert not (store.folder / "starts.json").exists()  # the verdict proved it
    store.install(newest.folder, prove)
    bundles._looked_s = 0.0
    bundles.look(line)
    run_until(line, lambda: line.bundle.version == newest.version)
    write_image(tmp_path / "in" / "2.png", 2)
    run_until(line, lambda: line.summary().frames == 2)
    events = events_of(line)
    entries = [json.loads(entry.body) for entry in line.journal.after(0) if entry.kind == "frame"]
    line.close()
    assert [entry["bundle"] for entry in entries] == [both[1], newest.version]
    assert [entry["verdict"] for entry in entries] == ["ok", "ok"]
    assert any("took over: it was installed" in event["text"] for event in events)


def test_a_running_line_keeps_its_bundle_where_the_new_one_has_other_labels(
    store: BundleStore, both: tuple[str, str], tmp_path: Path
) -> None:
    bundles = StoredBundles(store)
    line = Line(bundles.begin(), folder_config(tmp_path))
    line.start()
    other = make_bundle(tmp_path / "e" / "f", network=b"x", labels=("p", "q", "r"))
    store.install(other.folder, prove)
    bundles.look(line)
    run_until(line, lambda: any("not taken over" in e["text"] for e in events_of(line)))
    line.swap.close()
    events = events_of(line)
    line.close()
    assert line.bundle.version == both[1]
    assert store.open("current").version == both[1]
    assert any("back to the previous bundle" in e["text"] for e in events)


def test_a_line_notes_its_fall_back_while_an_installation_is_proven(
    store: BundleStore, both: tuple[str, str], tmp_path: Path
) -> None:
    newest = make_bundle(tmp_path / "e" / "f", network=b"newest")
    noted: list[str | None] = []
    running = store.open("current").folder.name

    def slow(bundle: Bundle) -> None:
        noting = threading.Thread(target=lambda: store.note_dense(running, "red"))
        noting.start()
        noting.join(10.0)
        noted.append(store.record().on_dense)
        prove(bundle)

    store.install(newest.folder, slow)
    running = store.open("current").folder.name
    store.install(newest.folder, slow)  # once copied, and once where it lies already
    assert noted == ["red", "red"]
    assert not store.note_dense("another", "red")
    assert store.record().on_dense is None  # what was installed last runs
    assert store.open("current").version == newest.version


def test_two_installations_at_a_time_come_one_after_the_other(
    store: BundleStore, both: tuple[str, str], tmp_path: Path
) -> None:
    second = make_bundle(tmp_path / "e" / "f", network=b"second")
    third = make_bundle(tmp_path / "g" / "h", network=b"third")
    other = threading.Thread(target=lambda: store.install(third.folder, prove))

    def slow(bundle: Bundle) -> None:
        other.start()
        other.join(0.3)
        prove(bundle)

    store.install(second.folder, slow)
    other.join(10.0)
    assert store.open("current").version == third.version
    assert store.open("previous").version == second.version
