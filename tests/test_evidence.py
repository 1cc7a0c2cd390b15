"""The evidence store: its quota, what a crash leaves, and a folder that cannot be written."""

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lpvit_edge.line import clock as clock_module
from lpvit_edge.line.config import line_config
from lpvit_edge.line.line import Line
from lpvit_edge.line.sink_config import EvidenceSink
from lpvit_edge.line.sinks import evidence as evidence_module
from lpvit_edge.line.sinks.evidence import EvidenceStore
from tests.broker import wait_for
from tests.line_bundle import make_bundle, write_image
from tests.plant import frame
from tests.test_line import events_of, folder_config, run_until

NOISE = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)  # 7.5 kB as PNG
DAY_S = 86_400.0


class Calendar(clock_module.SystemClock):
    """The machine's clocks, with a date that is set by hand."""

    now_s = 1_772_366_400.0  # 2026-03-01 12:00 UTC

    def unix_s(self) -> float:
        return self.now_s


@pytest.fixture
def calendar() -> Calendar:
    return Calendar()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_module, "_AGAIN_S", 0.02)


def store(folder: Path, clock: Calendar | None = None, **settings: Any) -> EvidenceStore:
    sink = msgspec.structs.replace(EvidenceSink(target=str(folder), min_free_gb=0.0), **settings)
    return EvidenceStore(sink, clock)


def images(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def entries(folder: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(folder / "index.sqlite") as db:
        rows = db.execute("SELECT number, verdict, file FROM images ORDER BY number").fetchall()
    db.close()
    return rows


def test_the_oldest_images_give_way_to_new_ones_beyond_the_quota(tmp_path: Path) -> None:
    one = store(tmp_path, max_gb=25e-6)
    for number in range(1, 7):
        one.deliver(frame(number, "reject"), NOISE)
    assert one.close(10.0) == 0
    assert [Path(name).stem for name in images(tmp_path)] == ["000004", "000005", "000006"]
    assert [row[0] for row in entries(tmp_path)] == [4, 5, 6]


def test_images_that_wait_for_the_disk_are_bounded_in_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_module, "_MOST_BYTES", 3 * NOISE.nbytes)
    (tmp_path / "evidence").write_text("no folder")
    one = store(tmp_path / "evidence")
    for number in range(1, 6):
        one.deliver(frame(number, "reject"), NOISE)
    assert one.missed == 2
    (tmp_path / "evidence").unlink()
    wait_for(lambda: len(images(tmp_path / "evidence")) == 3)
    wait_for(lambda: one._waiting_bytes == 0)
    one.deliver(frame(6, "reject"), np.tile(NOISE, (4, 1, 1)))  # larger than all, but alone
    assert one.close(10.0) == 0
    assert [row[0] for row in entries(tmp_path / "evidence")] == [1, 2, 3, 6]


def test_images_outlive_the_days_on_which_the_line_ran_and_no_others(
    tmp_path: Path, calendar: Calendar
) -> None:
    one = store(tmp_path, calendar, max_days=2.0)
    for number in range(1, 5):
        one.deliver(frame(number, "reject"), NOISE)
        calendar.now_s += DAY_S
    # A month without the line: nothing is a month older for it. Then a part that is no evidence.
    calendar.now_s += 30 * DAY_S
    one.deliver(frame(5, "ok", probabilities=(1.0,)), NOISE)
    assert one.close(10.0) == 0
    assert images(tmp_path) == ["2026-03-03/000003.png", "2026-03-04/000004.png"]


def test_a_time_of_day_that_jumps_ahead_and_back_removes_nothing(
    tmp_path: Path, calendar: Calendar
) -> None:
    one = store(tmp_path, calendar, max_days=30.0)
    one.deliver(frame(1, "reject"), NOISE)
    for number, days in ((2, 3650.0), (3, -3650.0), (4, -20_000.0), (5, 20_000.0)):
        calendar.now_s += days * DAY_S
        one.deliver(frame(number, "reject"), NOISE)
    assert one.close(10.0) == 0
    again = store(tmp_path, calendar, max_days=30.0)
    assert again.close(10.0) == 0
    assert [row[0] for row in entries(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(images(tmp_path)) == 5


_KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from lpvit_edge.line.sink_config import EvidenceSink
from lpvit_edge.line.sinks import evidence_index
from lpvit_edge.line.sinks.evidence_index import EvidenceIndex
from tests.plant import frame
index = EvidenceIndex(EvidenceSink(target=sys.argv[1], min_free_gb=0.0))
index.keep(frame(1, "reject"), "2026-03-01", b"x" * 5000)
write = evidence_index.write_atomic
def written_and_killed(path, content):
    if sys.argv[2] == "after":
        write(path, content)
    else:
        path.with_name(f".{os.getpid()}.{path.name}").write_bytes(content[:100])
    os.kill(os.getpid(), signal.SIGKILL)
evidence_index.write_atomic = written_and_killed
index.keep(frame(2, "reject"), "2026-03-01", b"x" * 5000)
"""


@pytest.mark.parametrize("when", ["while", "after"])
def test_an_image_that_a_kill_left_without_its_entry_is_taken_in_or_removed(
    tmp_path: Path, when: str, calendar: Calendar
) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path), when], check=False)
    assert done.returncode == -9
    assert len(images(tmp_path)) == 2
    one = store(tmp_path, calendar)
    assert one.close(10.0) == 0
    expected = [(1, "reject", "2026-03-01/000001.png")]
    if when == "after":
        expected.append((2, "unknown", "2026-03-01/000002.png"))
    assert entries(tmp_path) == expected
    assert images(tmp_path) == [row[2] for row in expected]
    small = store(tmp_path, calendar, max_gb=13e-6)  # what was taken in counts
    small.deliver(frame(3, "reject"), NOISE)
    assert small.close(10.0) == 0
    assert images(tmp_path)[-1].endswith("000003.png")
    assert len(images(tmp_path)) == 2


def test_an_entry_whose_image_somebody_removed_takes_no_room(
    tmp_path: Path, calendar: Calendar
) -> None:
    one = store(tmp_path, calendar)
    for number in (1, 2):
        one.deliver(frame(number, "reject"), NOISE)
    assert one.close(10.0) == 0
    (tmp_path / images(tmp_path)[0]).unlink()
    assert store(tmp_path, calendar).close(10.0) == 0
    assert [row[0] for row in entries(tmp_path)] == [2]


def test_a_folder_that_cannot_be_written_is_told_and_written_to_once_it_can(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "evidence"
    folder.write_bytes(b"a file where the folder should be")
    one = store(folder)
    wait_for(lambda: one.error is not None)
    assert one.error == f"evidence {folder}: File exists"
    one.deliver(frame(1, "reject"), NOISE)
    folder.unlink()
    wait_for(lambda: one.error is None and bool(images(folder)))
    assert one.close(10.0) == 0
    assert one.missed == 0
    assert [row[0] for row in entries(folder)] == [1]


def test_a_folder_that_goes_away_while_the_line_runs_is_made_anew(tmp_path: Path) -> None:
    folder, away = tmp_path / "evidence", tmp_path / "away"
    one = store(folder)
    one.deliver(frame(1, "reject"), NOISE)
    wait_for(lambda: bool(images(folder)) and len(entries(folder)) == 1)
    folder.rename(away)
    one.deliver(frame(2, "reject"), NOISE)
    wait_for(lambda: bool(images(folder)), what=one.error)
    assert one.close(10.0) == 0
    assert ([row[0] for row in entries(folder)], one.missed) == ([2], 0)
    assert [row[0] for row in entries(away)] == [1]


def test_an_index_that_is_none_is_told_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"no database" * 100)
    one = store(tmp_path)
    wait_for(lambda: one.error is not None)
    assert one.error is not None
    assert one.error.endswith(
        "file is not a database; move it away, a new one takes in the images that are there"
    )
    one.close(0.1)


def test_images_leave_the_disk_the_room_that_the_journal_needs(tmp_path: Path) -> None:
    one = store(tmp_path, min_free_gb=1e9)
    for number in range(1, 101):
        one.deliver(frame(number, "reject"), NOISE)
    wait_for(lambda: one.error is not None)
    assert one.error is not None
    assert "min_free_gb = 1e+09: the journal needs room; lower max_gb" in one.error
    left = one.close(0.1)
    assert left + one.missed == 100  # each is accounted for
    assert images(tmp_path) == []


def test_verdicts_go_on_where_neither_evidence_nor_file_can_be_written_and_an_alarm_tells(
    tmp_path: Path,
) -> None:
    """As after a power cut, when their disk comes back read-only or not at all."""
    (tmp_path / "disk").write_bytes(b"not mounted")
    sinks = [
        {"kind": "evidence", "target": str(tmp_path / "disk" / "evidence")},
        {"kind": "jsonl", "target": str(tmp_path / "disk" / "v.jsonl")},
    ]
    config = folder_config(tmp_path, sink=sinks, verdict={"accept": ["bad"]})
    line = Line(make_bundle(tmp_path / "bundle"), config)
    line.start()
    write_image(tmp_path / "in" / "a.png", 1)
    run_until(line, lambda: line.settlement.counts.reject == 1)
    run_until(line, lambda: len(line.status().sinks) == 2)
    run_until(line, lambda: sum(e["kind"] == "sink" for e in events_of(line)) == 2)
    texts = [e["text"] for e in events_of(line) if e["kind"] == "sink"]
    assert all("Not a directory" in text for text in texts), texts
    (tmp_path / "disk").unlink()
    run_until(line, lambda: line.status().sinks == {})
    left = line.close()
    assert left == {}
    assert len(images(tmp_path / "disk" / "evidence")) == 1
    assert b'"reject"' in (tmp_path / "disk" / "v.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"kind": "jsonl", "target": "out/v.jsonl"},
            {"kind": "jsonl", "target": "out/../out/v.jsonl"},
        ),
        ({"kind": "evidence", "target": "e"}, {"kind": "evidence", "target": "./e"}),
        (
            {"kind": "gpio", "target": "/dev/gpiochip0", "line": 17, "delay_ms": 100.0},
            {"kind": "gpio", "target": "/dev/gpiochip0", "line": "17", "delay_ms": 200.0},
        ),
    ],
    ids=["jsonl", "evidence", "gpio"],
)
def test_two_sinks_that_write_to_one_place_are_refused_however_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: dict[str, Any], other: dict[str, Any]
) -> None:
    from lpvit_edge.errors import UnknownOptionError
    from lpvit_edge.line.journal import Journal
    from lpvit_edge.line.sinks import open_sinks

    monkeypatch.chdir(tmp_path)
    source = {"kind": "folder", "target": "in"}
    config = line_config({"source": source, "sink": [one, other]}, name="test")
    journal = Journal(tmp_path / "journal.sqlite")
    with pytest.raises(UnknownOptionError, match=f"two sinks are called {one['kind']} "):
        open_sinks(config.sink, journal)
    journal.close()
    assert list(tmp_path.iterdir()) == [tmp_path / "journal.sqlite"]
