"""Answers that are no numbers, disks that refuse, and parts that are too many."""

import json
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import FileFormatError
from lpvit_edge.line.clock import Clock, SystemClock
from lpvit_edge.line.feed import Health, Intake
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.judge import lost_frame
from lpvit_edge.line.line import Line
from lpvit_edge.line.policy import OVERFLOW, FrameQueue, Policy
from lpvit_edge.line.records import Action, FrameRecord, LineEvent, StageLatency
from lpvit_edge.line.settle import Settlement
from lpvit_edge.line.sink_watch import CountWatch, LineWatch
from lpvit_edge.line.verdict import VerdictRule, judge
from lpvit_engines.fake import FakeEngine
from tests.line_bundle import LABELS, make_bundle, write_image
from tests.test_line import config, events_of, folder_config, frame, frames_of, run_until

if TYPE_CHECKING:
    from numpy.typing import NDArray


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


class Unsound(FakeEngine):
    """An engine whose float16 overflowed: the first label is NaN."""

    def infer_all(self, x: "NDArray[np.float32]") -> "dict[str, NDArray[np.float32]]":
        outputs = {name: values.copy() for name, values in super().infer_all(x).items()}
        next(iter(outputs.values()))[0, 0] = np.nan
        return outputs


def test_an_answer_that_is_no_number_is_an_engine_error_and_never_a_good_part(
    bundle: Bundle, tmp_path: Path
) -> None:
    accepted = {"accept": list(LABELS[:1]), "min_confidence": 0.6}
    line = Line(bundle, folder_config(tmp_path, verdict=accepted))
    line.start()
    sick: Any = Unsound(bundle.path("model.onnx"))
    line.judge.use(bundle, sick, lambda: sick)
    write_image(tmp_path / "in" / "a.png", 60)
    run_until(line, lambda: bool(frames_of(line)))
    (record,) = frames_of(line)
    line.close()
    assert (record["verdict"], record["action"]) == ("safe", "reject")
    assert "NaN or infinity" in record["reason"]
    assert record["label"] is None


def test_a_confidence_that_is_no_number_is_below_every_limit() -> None:
    probabilities = np.full(3, np.nan)
    assert judge(probabilities, LABELS, VerdictRule(accept=LABELS[:1])).verdict == "reject"


def test_a_hung_engine_leaves_no_part_without_its_verdict_while_the_line_stops(
    bundle: Bundle, tmp_path: Path
) -> None:
    hanging, gate = threading.Event(), threading.Event()

    class Hung(FakeEngine):
        def infer_all(self, x: "NDArray[np.float32]") -> "dict[str, NDArray[np.float32]]":
            hanging.set()
            gate.wait(20)
            return super().infer_all(x)

    deadline = {"kind": "triggered", "deadline_ms": 50.0}
    line = Line(bundle, folder_config(tmp_path, policy=deadline))
    line.start()
    hung: Any = Hung(bundle.path("model.onnx"))
    line.judge.use(bundle, hung, lambda: hung)
    judging = threading.Thread(target=line.run)
    judging.start()
    write_image(tmp_path / "in" / "a.png", 60)
    assert hanging.wait(10)
    line.request_stop()
    end_s = time.monotonic() + 10
    while not frames_of(line) and time.monotonic() < end_s:
        time.sleep(0.01)
    (record,) = frames_of(line)  # decided while the engine still hangs
    gate.set()
    judging.join()
    line.close()
    assert record["verdict"] == "safe"


def test_a_part_that_comes_with_little_time_left_wakes_the_watch_over_deadlines(
    tmp_path: Path,
) -> None:
    """It waited in the camera or on its way; the next look may come after its deadline."""
    journal = Journal(tmp_path / "journal.sqlite")
    settlement = settlement_of(journal, [], safe="reject", deadline_ms=60_000.0)
    fresh = frame(1)
    settlement.expect(fresh)
    assert not settlement.hurry.is_set()
    settlement.expect(
        msgspec.structs.replace(fresh, number=2, captured_ns=fresh.captured_ns - 50_000_000_000)
    )
    assert settlement.hurry.is_set()
    journal.close()


def test_a_refusing_disk_changes_only_the_verdict_that_it_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the refusal and what is told instead an event may come from another thread."""
    journal = Journal(tmp_path / "journal.sqlite")
    told: list[FrameRecord] = []
    settlement = settlement_of(journal, told, safe="pass")
    refuses = [True]
    flush = journal.flush

    def sometimes() -> bool:
        return not refuses[0] and flush()

    monkeypatch.setattr(journal, "flush", sometimes)
    for number, label in ((1, "ok"), (2, "bad")):
        part = frame(number)
        settlement.expect(part)
        settlement.settle(record_of(part, label))
        settlement.event("other", "something else", "info")
    refuses[0] = False
    journal.flush()
    bodies = [msgspec.json.decode(entry.body) for entry in journal.after(0)]
    journal.close()
    frames = [body for body in bodies if "number" in body]
    assert [(r.verdict, r.action) for r in told] == [("safe", "pass"), ("safe", "reject")]
    assert [(b["verdict"], b["action"]) for b in frames] == [("safe", "pass"), ("safe", "reject")]
    assert sum("something else" in body.get("text", "") for body in bodies) == 2


def test_another_program_that_writes_to_the_journal_holds_no_verdict(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    journal = Journal(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    begin_s = time.monotonic()
    written = journal.append(LineEvent(kind="x", text="y", severity="info", at=0.0))
    assert time.monotonic() - begin_s < 2.0  # sqlite's own patience is 5 s
    assert (written, journal.refusal) == (False, "database is locked")
    other.execute("ROLLBACK")
    assert journal.flush()
    journal.close()
    other.close()


def test_parts_beyond_the_queue_get_the_safe_verdict_at_once_and_their_images_are_not_kept(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    told: list[FrameRecord] = []
    settlement = settlement_of(journal, told, safe="reject")
    queue = FrameQueue(Policy(kind="triggered", queue=2))
    intake = Intake(queue, settlement, SystemClock())
    for number in range(1, 11):
        intake.accept(frame(number))
    journal.close()
    assert [number for number in range(1, 11) if settlement.is_open(number)] == [1, 2]
    assert [(r.number, r.verdict, r.reason) for r in told] == [
        (number, "safe", "queue full") for number in range(3, 11)
    ]
    assert queue.overflowed == 8
    waiting = [queue.take(0.0) for _ in range(10)]
    assert sum(part is not None and part.pixels is not None for part in waiting) == 2


def test_a_part_that_overflowed_in_the_capture_process_is_counted_and_alarmed_too(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    settlement = settlement_of(journal, [], safe="reject")
    queue = FrameQueue(Policy(kind="triggered"))
    intake = Intake(queue, settlement, SystemClock())
    intake.accept(msgspec.structs.replace(frame(1, pixels=False), lost=OVERFLOW))
    feed: Any = SimpleNamespace(health=Health())
    LineWatch(settlement, queue, feed, journal, SystemClock()).look(engine_silent=False)
    (event,) = [json.loads(e.body) for e in journal.after(0) if e.kind == "event"]
    journal.close()
    assert (event["kind"], event["severity"]) == ("overflow", "alarm")
    assert event["text"] == "1 parts found the queue full"


def test_a_folder_is_never_judged_in_part(tmp_path: Path) -> None:
    assert folder_config(tmp_path).policy.kind == "wait"
    camera = {"kind": "synthetic", "target": "camera.py:image"}
    assert config(tmp_path, source=camera).policy.kind == "newest"
    with pytest.raises(FileFormatError, match="one of a folder comes only once"):
        folder_config(tmp_path, policy={"kind": "newest"})


def test_counts_that_rise_are_told_with_a_rest_between() -> None:
    class Turned(SystemClock):
        now_ns = 0

        def monotonic_ns(self) -> int:
            return self.now_ns

    events: list[tuple[str, str, str]] = []
    clock = Turned()
    watch = CountWatch(lambda *event: events.append(event), clock)
    for count in (0, 2, 3, 5):
        watch.look("late", count, "{n} parts had no verdict in time", "alarm")
    clock.now_ns = 11_000_000_000
    watch.look("late", 5, "{n} parts had no verdict in time", "alarm")
    assert events == [
        ("late", "2 parts had no verdict in time", "alarm"),
        ("late", "3 parts had no verdict in time", "alarm"),
    ]


def test_a_part_of_which_nobody_knows_when_it_came_is_in_no_percentile(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    settlement = settlement_of(journal, [], safe="reject")
    lost = lost_frame(1, clock=SystemClock(), why="the line was down")
    settlement.expect(lost)
    settlement.settle_safe(lost, "the line was down")
    journal.close()
    assert settlement.counts.safe == 1
    assert settlement.latency.percentile_ms(50) is None


def settlement_of(
    journal: Journal,
    told: list[FrameRecord],
    *,
    safe: Action,
    deadline_ms: float | None = None,
    clock: Clock | None = None,
) -> Settlement:
    return Settlement(
        journal,
        VerdictRule(safe=safe),
        clock=clock or SystemClock(),
        source="test",
        bundle="b",
        tell=lambda record, *_: told.append(record),
        tell_event=lambda event: None,
        deadline_ms=deadline_ms,
    )


def record_of(part: Frame, label: str) -> FrameRecord:
    return FrameRecord(
        number=part.number,
        source="test",
        captured_at=part.captured_at,
        captured_ns=part.captured_ns,
        label=label,
        verdict="ok" if label == "ok" else "reject",
        action="pass" if label == "ok" else "reject",
        bundle="b",
        latency=StageLatency(total_ms=1.0),
    )


def test_the_time_of_day_is_watched_while_parts_come(bundle: Bundle, tmp_path: Path) -> None:
    class Jumping(SystemClock):
        offset_s = 0.0

        def unix_s(self) -> float:
            return super().unix_s() + self.offset_s

    (tmp_path / "camera.py").write_text(
        "import numpy as np\ndef frame(n):\n    return np.full((6, 8, 3), n % 255, np.uint8)\n"
    )
    source = {"kind": "synthetic", "target": f"{tmp_path / 'camera.py'}:frame", "rate": 50.0}
    clock = Jumping()
    line = Line(bundle, config(tmp_path, source=source), clock=clock)
    line.start()
    run_until(line, lambda: line.summary().frames > 2)
    clock.offset_s = -3600.0
    # Each step waits for a part and gets one, so that the line's own loop never rests.
    for _ in range(60):
        assert line.step(5.0)
    texts = [e["text"] for e in events_of(line) if e["kind"] == "clock"]
    line.close()
    assert len(texts) == 1
    assert "jumped by -3600.0 s" in texts[0]
