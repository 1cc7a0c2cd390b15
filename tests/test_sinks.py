"""What every sink keeps to, and what the line does about one that fails."""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, FileFormatError, SinkError, UnknownOptionError
from lpvit_edge.line import journal as journal_module
from lpvit_edge.line.config import line_config, read_config
from lpvit_edge.line.journal import Entry, Journal
from lpvit_edge.line.line import Line
from lpvit_edge.line.outputs import Outputs
from lpvit_edge.line.sink_config import SinkConfig, WebhookSink
from lpvit_edge.line.sink_watch import SinkWatch
from lpvit_edge.line.sinks import open_sinks
from lpvit_edge.line.sinks.remote import RemoteSink
from lpvit_engines.fake import FakeEngine
from tests.broker import wait_for
from tests.line_bundle import make_bundle, write_image
from tests.plant import TurnedClock, frame

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").rglob("sinks/*.toml"))

KINDS = {str(kind.__struct_config__.tag): kind for kind in SinkConfig.__args__}
REQUIRED: dict[str, dict[str, object]] = {
    "gpio": {"line": 17, "delay_ms": 100.0},
    "opcua": {"nodes": {"verdict": "ns=2;s=V"}},
}


class Other:
    """The other end of a wire, whose connection can be cut."""

    name = "other"
    batch = 4
    longest_wait_s = 0.2
    missed = 0

    def __init__(self) -> None:
        self.is_cut = False
        self.took: list[int] = []
        self.beats: list[bool] = []

    def resume(self, delivered: int, newest: int) -> int:
        return delivered

    def too_old(self, entries: Sequence[Entry]) -> int:
        return 0

    def send(self, entries: Sequence[Entry]) -> None:
        if self.is_cut:
            raise SinkError("other: the wire is cut")
        self.took.extend(entry.id for entry in entries)

    def beat(self, *, is_held: bool) -> None:
        if self.is_cut:
            raise SinkError("other: the wire is cut")
        self.beats.append(is_held)

    def disconnect(self) -> None:
        """Nothing is open."""


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


def test_the_heart_beats_while_verdicts_never_cease(journal: Journal) -> None:
    other = Other()
    sink = RemoteSink(other, journal)
    stop = threading.Event()

    def decide() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            journal.append(frame(number))

    deciding = threading.Thread(target=decide)
    deciding.start()
    try:
        wait_for(lambda: len(other.beats) >= 4, what=(other.beats, len(other.took)))
        sink.hold(True)
        wait_for(lambda: other.beats[-1])
        assert len(other.took) > 20
    finally:
        stop.set()
        deciding.join()
    assert sink.close(10.0) == 0
    assert other.took == list(range(1, journal.last_id() + 1))


def test_a_sink_that_fails_and_recovers_is_told_once_each(journal: Journal) -> None:
    other = Other()
    outputs, clock = Outputs(journal), TurnedClock()
    sink = RemoteSink(other, journal)
    outputs.sinks = (sink,)
    events: list[str] = []
    watch = SinkWatch(
        outputs, lambda _, text, severity: events.append(f"{severity}: {text}"), clock
    )
    other.is_cut = True
    wait_for(lambda: sink.error is not None)
    for _ in range(3):
        watch.look()
    other.is_cut = False
    wait_for(lambda: sink.error is None)
    watch.look()
    assert events == [
        "warning: other: the wire is cut; it is tried again", "info: other: takes verdicts again",
    ]  # fmt: skip
    assert sink.close(5.0) == 0


def test_verdicts_that_a_sink_missed_are_counted_in_alarms_with_a_rest_between(
    journal: Journal,
) -> None:
    other = Other()
    outputs, clock = Outputs(journal), TurnedClock()
    sink = RemoteSink(other, journal)
    outputs.sinks = (sink,)
    events: list[str] = []
    watch = SinkWatch(
        outputs, lambda _, text, severity: events.append(f"{severity}: {text}"), clock
    )
    for missed in (0, 2, 3, 7):
        other.missed = missed
        watch.look()
    clock.turn(10.0)
    watch.look()
    watch.look()
    assert events == [
        "alarm: other: missed 2 verdicts",
        "alarm: other: missed 5 verdicts",
    ]
    assert sink.close(5.0) == 0


def test_two_sinks_that_the_journal_cannot_tell_apart_are_refused(journal: Journal) -> None:
    pytest.importorskip("httpx", reason="extra webhook is not installed")
    one = WebhookSink(target="http://bob:secret@127.0.0.1:1/")
    other = WebhookSink(target="http://eve:wanton@127.0.0.1:1/")
    with pytest.raises(UnknownOptionError, match=r"two sinks are called webhook http://\*\*\*@127"):
        open_sinks((one, other), journal)
    paths = tuple(WebhookSink(target=f"http://127.0.0.1:1/{path}") for path in ("a", "b"))
    sinks = open_sinks(paths, journal)
    assert len({sink.name for sink in sinks}) == 2
    for sink in sinks:
        sink.close(0.1)


def test_verdicts_that_waited_too_long_for_a_sink_are_counted_and_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite", keep=10)
    other = Other()
    other.is_cut = True
    outputs = Outputs(journal)
    outputs.sinks = (sink := RemoteSink(other, journal),)
    for number in range(1, 4001):
        journal.append(frame(number))
    events: list[str] = []
    watch = SinkWatch(
        outputs, lambda _, text, severity: events.append(f"{severity}: {text}"), TurnedClock()
    )
    watch.look()
    assert "alarm: other: missed 3900 verdicts" in events
    assert outputs.missed() == {"other": 3900}
    other.is_cut = False
    assert sink.close(5.0) == 0
    assert other.took == list(range(3901, 4001))
    journal.close()


def test_entries_that_no_disk_took_are_told_as_lost(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "BACKLOG", 3)
    outputs = Outputs(journal)
    events: list[str] = []
    watch = SinkWatch(
        outputs, lambda kind, text, severity: events.append(f"{kind}: {text}"), TurnedClock()
    )
    journal._db.execute("PRAGMA query_only=ON")
    for number in range(1, 6):
        assert not journal.append(frame(number))
    watch.look()
    journal._db.execute("PRAGMA query_only=OFF")
    assert events == ["disk: journal: 2 entries are lost, since the disk refused them for too long"]


def test_a_sink_is_closed_and_says_what_it_leaves_where_the_journal_cannot_be_read(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Other()
    other.is_cut = True
    sink = RemoteSink(other, journal)
    for number in (1, 2, 3):
        journal.append(frame(number))
    wait_for(lambda: sink.error is not None)

    class Unreadable:
        def execute(self, *_: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_db", Unreadable())
        assert sink.close(0.1) == 3


def test_an_engine_that_hangs_puts_the_sinks_on_hold_though_the_judge_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "in").mkdir()
    source = {"kind": "folder", "target": str(tmp_path / "in"), "poll_s": 0.005}
    config = line_config({"state": str(tmp_path / "state"), "source": source}, name="test")
    release = threading.Event()
    engine = FakeEngine(bundle.path("model.onnx"), classes=3)

    def hang(batch: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        release.wait()
        raise EngineError("it hung")

    clock = TurnedClock(runs=True)
    line = Line(bundle, config, clock=clock, load=lambda: engine)
    line.start()
    wait_for(lambda: line.step(0.02) and line.outputs.held is None)
    monkeypatch.setattr(engine, "infer_all", hang)
    write_image(tmp_path / "in" / "a.png", 100)
    judging = threading.Thread(target=lambda: line.step(5.0))
    judging.start()
    try:
        wait_for(lambda: line.settlement.is_open(1))
        clock.turn(5.1)
        wait_for(lambda: line.outputs.held is not None, what=line.outputs.held)
        assert line.outputs.held == "the engine does not answer"
        assert judging.is_alive()  # and cannot have said so itself
    finally:
        release.set()
        judging.join()
        line.close()


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_the_examples_are_valid_and_show_every_option(path: Path) -> None:
    tables = read_config(path)
    line_config(tables, name=path.name)
    for table in tables["sink"]:
        known = {field.encode_name for field in msgspec.structs.fields(KINDS[table["kind"]])}
        assert set(table) - {"kind"} == known


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_key_is_refused_with_its_name_and_place(kind: str) -> None:
    sink = REQUIRED.get(kind, {}) | {"kind": kind, "target": "t", "colour": "red"}
    source = {"kind": "folder", "target": "in"}
    with pytest.raises(FileFormatError, match=r"line.toml: .*`colour`.*\$\.sink\[0\]"):
        line_config({"source": source, "sink": [sink]}, name="line.toml")


@pytest.mark.parametrize(
    "sink",
    [
        {"kind": "gpio", "target": "/dev/gpiochip0", "line": 17, "delay_ms": 200},
        {"kind": "modbus", "target": "modbus://plc", "max_age_ms": 200},
    ],
)
def test_a_deadline_whose_safe_verdict_would_come_too_late_is_refused(
    sink: dict[str, object],
) -> None:
    tables = {"source": {"kind": "folder", "target": "in"}, "sink": [sink]}
    line_config(tables | {"policy": {"deadline_ms": 199}}, name="line.toml")
    with pytest.raises(FileFormatError, match=r"sink\[0\]\.\w+_ms = 200 is not above deadline_ms"):
        line_config(tables | {"policy": {"deadline_ms": 200}}, name="line.toml")
