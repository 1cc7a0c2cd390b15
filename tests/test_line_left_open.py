"""Numbers and verdicts over restarts: none twice, none made up, none forgotten."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import EngineError
from lpvit_edge.line.clock import SystemClock
from lpvit_edge.line.folder import FolderFeed
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.left_open import go_on, note_settled
from lpvit_edge.line.line import Line
from lpvit_edge.line.records import FrameRecord
from lpvit_edge.line.sequence import SequenceFile
from lpvit_edge.line.sink_config import JsonlSink
from lpvit_edge.line.sinks.jsonl import JsonLines
from lpvit_engines.fake import FakeEngine
from tests.broker import wait_for
from tests.line_bundle import make_bundle, write_image
from tests.plant import TurnedClock
from tests.plant import frame as record
from tests.test_line import events_of, folder_config, frames_of, run_until
from tests.test_line import frame as part
from tests.test_line_answers import settlement_of


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def gone_on(journal: Journal, sequence: SequenceFile) -> tuple[list[int], list[str]]:
    """Numbers that got the safe verdict at a start, and what was said."""
    told: list[FrameRecord] = []
    settlement = settlement_of(journal, told, safe="reject")
    before = journal.last_id()
    go_on(sequence, journal, settlement, SystemClock(), claimed=(), parts=True)
    bodies = [json.loads(entry.body) for entry in journal.after(before) if entry.kind == "event"]
    return [one.number for one in told], [body["text"] for body in bodies]


def test_after_a_kill_of_a_long_run_only_what_was_open_gets_the_safe_verdict(
    tmp_path: Path,
) -> None:
    """The journal has long forgotten the first parts; they had their verdicts."""
    journal = Journal(tmp_path / "journal.sqlite", keep=10)
    with SequenceFile(tmp_path / "sequence") as sequence:
        assert gone_on(journal, sequence) == ([], [])
        told: list[FrameRecord] = []
        settlement = settlement_of(journal, told, safe="reject")
        for _ in range(4100):
            number = sequence.next()
            settlement.expect(part(number))
            if number not in (4097, 4100):
                settlement.settle(record(number))
            if number % 100 == 0:
                note_settled(journal, settlement.settled_through)
        assert len(journal.after(0, limit=10_000)) < 200
        numbers, texts = gone_on(journal, sequence)
    journal.close()
    assert numbers == [4097, 4100]
    assert texts == ["the line had ended without notice: 2 frames without a verdict (4097 to 4100)"]


def test_a_verdict_that_no_disk_took_yet_is_not_noted_as_settled(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(record(1))
    journal._db.execute("PRAGMA query_only=ON")
    assert not journal.append(record(2))
    journal._db.execute("PRAGMA query_only=OFF")
    note_settled(journal, 2)
    assert journal.marked("settled") is None
    journal.flush()
    note_settled(journal, 2)
    assert journal.marked("settled") == 2
    journal.close()


def test_a_new_journal_makes_up_no_verdicts_on_what_was_numbered_before(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    with SequenceFile(tmp_path / "sequence") as sequence:
        sequence.reach(5_000_000)
        numbers, texts = gone_on(journal, sequence)
        assert gone_on(journal, sequence) == ([], [])
    journal.close()
    assert numbers == []
    assert texts == ["the journal is new: whether frames 1 to 5000000 have verdicts is not known"]


def test_no_number_is_given_twice_where_a_power_cut_took_the_file_of_numbers_back(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    for number in (1, 2, 3):
        journal.append(record(number))
    journal.mark("settled", 1)
    with SequenceFile(tmp_path / "sequence") as sequence:
        sequence.reach(1)
        numbers, texts = gone_on(journal, sequence)
        assert sequence.next() == 4
    journal.close()
    assert numbers == []
    assert texts == ["frame numbers go on from 3: their file said 1, as after a power cut"]


def test_a_verdict_on_a_number_that_has_one_is_counted_and_not_silently_left_out(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    for number in (1, 2, 2):
        journal.append(record(number))
    assert journal.repeated == 1
    journal.close()


def test_a_damaged_journal_holds_the_safe_verdict_and_does_not_end_the_line(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    line = Line(bundle, folder_config(tmp_path))
    line.start()
    whole = line.journal._db

    class Damaged:
        def execute(self, statement: str, *values: Any) -> Any:
            if statement.startswith("INSERT OR IGNORE"):
                raise sqlite3.DatabaseError("database disk image is malformed")
            return whole.execute(statement, *values)

    monkeypatch.setattr(line.journal, "_db", Damaged())
    write_image(tmp_path / "in" / "a.png", 1)
    run_until(line, lambda: line.settlement.counts.unrecorded == 1)
    assert line.journal.refusal == "database disk image is malformed"
    monkeypatch.setattr(line.journal, "_db", whole)
    line.close()


@pytest.mark.parametrize(
    ("delivered", "newest", "resumed"),
    [
        (5, 9, 7),  # the file has what the cursor does not know of
        (9, 9, 7),  # a power cut took the file's last lines
        (0, 0, 0),  # the journal is new: its entries count from 1 again
        (4, 6, 4),  # a power cut took the journal's last entries
    ],
)
def test_a_file_of_verdicts_goes_on_where_the_journal_is_whichever_of_them_lost_more(
    tmp_path: Path, delivered: int, newest: int, resumed: int
) -> None:
    path = tmp_path / "v.jsonl"
    path.write_bytes(b'{"entry":7,"kind":"frame","record":{}}\n')
    assert JsonLines(JsonlSink(target=str(path))).resume(delivered, newest) == resumed


def test_parts_that_an_unexpected_error_tears_from_the_judge_have_their_verdicts_before_the_end(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(bundle, folder_config(tmp_path))
    line.start()

    def broken(frame: Any, pixels: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(line.judge, "_judge", broken)
    for number in range(2):
        write_image(tmp_path / "in" / f"{number}.png", number)
    wait_for(lambda: line.sequence.taken == 2)
    with pytest.raises(KeyError):
        run_until(line, lambda: False)
    with pytest.raises(KeyError):  # it is met again by the part that waits
        line.close()
    assert line.outputs.held == "the line stopped"
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    frames = [json.loads(entry.body) for entry in journal.after(0) if entry.kind == "frame"]
    journal.close()
    assert [(one["number"], one["verdict"], one["reason"]) for one in frames] == [
        (1, "safe", "the line stopped"),
        (2, "safe", "the line stopped"),
    ]


def test_an_image_for_which_a_stopping_line_has_no_room_is_judged_by_the_next_run(
    bundle: Bundle, tmp_path: Path
) -> None:
    settings = folder_config(tmp_path, policy={"kind": "wait", "queue": 1})
    line = Line(bundle, settings)
    line.start()
    for number in range(3):
        write_image(tmp_path / "in" / f"{number}.png", number)
    wait_for(lambda: line.sequence.taken >= 2)  # one is in the queue, one waits for room
    line.close()
    again = Line(bundle, settings)
    again.start()
    run_until(again, lambda: len(frames_of(again)) == 3)
    verdicts = {one["part_id"]: one["verdict"] for one in frames_of(again)}
    gaps = [event for event in events_of(again) if event["kind"] == "gap"]
    again.close()
    assert verdicts == {"0.png": "ok", "1.png": "ok", "2.png": "ok"}
    assert gaps == []


def test_images_that_cannot_be_claimed_lose_the_source_once_and_are_judged_later(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(bundle, folder_config(tmp_path))
    line.start()
    run_until(line, lambda: line.feed.health.state == "live")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if target.parent.name == "claimed":
            raise OSError(30, "Read-only file system")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        for number in range(2):
            write_image(tmp_path / "in" / f"{number}.png", number)
        run_until(line, lambda: line.outputs.held is not None)
        time.sleep(0.1)  # many more looks
    run_until(line, lambda: len(frames_of(line)) == 2)
    verdicts = [(one["number"], one["verdict"]) for one in frames_of(line)]
    told = [e["text"] for e in events_of(line) if e["kind"] == "source"]
    line.close()
    assert verdicts == [(1, "ok"), (2, "ok")]
    assert told == ["live", f"lost: {tmp_path / 'in'}: Read-only file system", "live"]


def test_an_image_that_cannot_be_put_away_ends_no_line_and_is_not_judged_twice(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(bundle, folder_config(tmp_path))
    line.start()
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if target.parent.name == "done":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        write_image(tmp_path / "in" / "a.png", 1)
        run_until(line, lambda: len(frames_of(line)) == 1)
    told = [e["text"] for e in events_of(line) if e["kind"] == "source"]
    line.close()
    image = tmp_path / "in" / "claimed" / "1.a.png"
    assert f"lost: {image}: No space left on device" in told
    assert image.is_file()
    again = Line(bundle, folder_config(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refused)
        again.start()
        run_until(again, lambda: again.feed.health.state == "lost")
    run_until(again, lambda: (tmp_path / "in" / "done" / "1.a.png").is_file())
    assert len(frames_of(again)) == 1
    assert not again.threads.died()
    again.close()


def test_an_image_that_another_line_claimed_first_is_not_this_line_s(
    bundle: Bundle, tmp_path: Path
) -> None:
    line = Line(bundle, folder_config(tmp_path))
    feed = line.feed
    assert isinstance(feed, FolderFeed)
    (tmp_path / "in" / "claimed").mkdir()
    assert feed._claim(tmp_path / "in" / "gone.png") is None
    write_image(tmp_path / "in" / "here.png", 1)
    claimed = feed._claim(tmp_path / "in" / "here.png")
    line.close()
    assert claimed == (1, tmp_path / "in" / "claimed" / "1.here.png")


def test_a_disk_that_hangs_puts_the_outputs_on_hold_though_all_who_write_wait(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = TurnedClock(runs=True)
    line = Line(bundle, folder_config(tmp_path), clock=clock)
    line.start()
    wait_for(lambda: line.step(0.02) and line.outputs.held is None)
    release = threading.Event()
    write = line.journal._write_backlog

    def hang() -> None:
        release.wait(30.0)
        write()

    monkeypatch.setattr(line.journal, "_write_backlog", hang)
    write_image(tmp_path / "in" / "a.png", 1)
    judging = threading.Thread(target=lambda: line.step(5.0))
    judging.start()
    try:
        wait_for(lambda: line.sequence.taken == 1 and line.journal.waiting > 0)
        clock.turn(5.1)
        wait_for(lambda: line.outputs.held is not None)
        assert line.outputs.held == "the engine does not answer"
        assert judging.is_alive()  # still at the disk that hangs
    finally:
        release.set()
        judging.join()
        line.close()


def test_an_engine_that_hangs_is_an_event_and_so_is_its_return(
    bundle: Bundle, tmp_path: Path
) -> None:
    clock = TurnedClock(runs=True)
    entered, gate = threading.Event(), threading.Event()

    class Hanging(FakeEngine):
        def infer_all(self, x: Any) -> Any:
            entered.set()
            if not gate.wait(30.0):
                raise EngineError("nobody let it go")
            return super().infer_all(np.asarray(x))

    line = Line(bundle, folder_config(tmp_path), clock=clock)
    line.start()
    wait_for(lambda: line.step(0.02) and line.outputs.held is None)
    hanging: Any = Hanging(bundle.path("model.onnx"))
    line.judge.use(bundle, hanging, lambda: hanging)
    write_image(tmp_path / "in" / "a.png", 1)
    judging = threading.Thread(target=lambda: run_until(line, lambda: line.summary().frames == 1))
    judging.start()
    assert entered.wait(10.0)
    clock.turn(5.1)
    wait_for(lambda: any(e["kind"] == "engine" for e in events_of(line)))
    gate.set()
    judging.join()
    wait_for(lambda: len([e for e in events_of(line) if e["kind"] == "engine"]) == 2)
    told = [(e["severity"], e["text"]) for e in events_of(line) if e["kind"] == "engine"]
    line.close()
    assert told == [
        ("alarm", "the engine gives no answer; the outputs are held"),
        ("info", "the engine answers; the outputs are not held for it any more"),
    ]


def test_the_log_of_the_journal_is_moved_into_its_file_beside_those_who_write(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    for number in range(1, 101):
        journal.append(record(number))
    journal.checkpoint()
    shutil.copy(tmp_path / "journal.sqlite", tmp_path / "alone.sqlite")  # without its log
    journal.append(record(101))
    alone = Journal(tmp_path / "alone.sqlite")
    assert (alone.last_id(), journal.last_id()) == (100, 101)
    alone.close()
    journal.close()


def test_the_time_until_a_verdict_counts_what_the_disk_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = TurnedClock()
    journal = Journal(tmp_path / "journal.sqlite")
    settlement = settlement_of(journal, [], safe="reject", clock=clock)
    write = journal._write_backlog

    def slow() -> None:
        clock.turn(2.0)
        write()

    monkeypatch.setattr(journal, "_write_backlog", slow)
    one = msgspec.structs.replace(part(1), captured_ns=0)
    settlement.expect(one)
    settlement.settle(msgspec.structs.replace(record(1), captured_ns=0))
    journal.close()
    assert settlement.latency.largest_ms == 2000.0


def test_a_line_that_is_stopped_while_it_warms_up_ends_without_a_part(
    bundle: Bundle, tmp_path: Path
) -> None:
    line = Line(bundle, folder_config(tmp_path))
    write_image(tmp_path / "in" / "a.png", 1)
    line.request_stop()
    wait_for(lambda: not any(thread.name == "stop" for thread in threading.enumerate()))
    line.start()
    line.run()
    assert line.summary().frames == 0
    line.close()
    assert (tmp_path / "in" / "a.png").is_file()
