"""The line under the faults that a factory has: nothing decided is lost, gaps are recorded."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from lpvit_edge.bundle import Bundle, open_bundle, refuse_other_device
from lpvit_edge.errors import (
    DeviceMismatchError,
    EngineError,
    EnvironmentUnfitError,
    FileFormatError,
    MismatchError,
)
from lpvit_edge.images import Preprocess, decode_pixels, preprocessed, read_image
from lpvit_edge.line.clock import SystemClock
from lpvit_edge.line.config import LineConfig, line_config, parse_sink, parse_source
from lpvit_edge.line.frames import Frame
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.line import Line
from lpvit_edge.line.percentiles import LatencyHistogram
from lpvit_edge.line.policy import FrameQueue, Policy
from lpvit_edge.line.records import LineEvent
from lpvit_edge.line.redact import address_name, redacted
from lpvit_edge.line.sequence import SequenceFile
from lpvit_engines.fake import FakeEngine
from tests.line_bundle import make_bundle, write_image

ROOT = Path(__file__).parent.parent
CAMERA = "import numpy as np\ndef frame(n):\n    return np.full((6, 8, 3), n % 255, np.uint8)\n"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def camera(tmp_path: Path) -> str:
    (tmp_path / "camera.py").write_text(CAMERA)
    return f"{tmp_path / 'camera.py'}:frame"


def config(tmp_path: Path, **tables: Any) -> LineConfig:
    return line_config({"state": str(tmp_path / "state"), **tables}, name="test")


def folder_config(tmp_path: Path, **tables: Any) -> LineConfig:
    (tmp_path / "in").mkdir(exist_ok=True)
    source = {"kind": "folder", "target": str(tmp_path / "in"), "poll_s": 0.005}
    return config(tmp_path, source=source, **tables)


def run_until(line: Line, done: Callable[[], bool], *, seconds: float = 15.0) -> None:
    end_s = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end_s, line.status()
        line.step(0.02)


def frames_of(line: Line) -> list[dict[str, Any]]:
    entries = line.journal.after(0, limit=100_000)
    return [json.loads(e.body) for e in entries if e.kind == "frame"]


def events_of(line: Line) -> list[dict[str, Any]]:
    entries = line.journal.after(0, limit=100_000)
    return [json.loads(e.body) for e in entries if e.kind == "event"]


def frame(number: int, *, pixels: bool = True) -> Frame:
    now_ns = time.monotonic_ns()
    image = np.zeros((6, 8, 3), np.uint8) if pixels else None
    return Frame(
        number=number, captured_at=0.0, captured_ns=now_ns, received_ns=now_ns, pixels=image
    )


def test_newest_drops_and_counts_what_waited() -> None:
    dropped: list[int] = []
    queue = FrameQueue(Policy(kind="newest"), on_drop=lambda f: dropped.append(f.number))
    for number in (1, 2, 3):
        queue.put(frame(number))
    taken = queue.take(0.0)
    assert taken is not None
    assert (taken.number, dropped, queue.dropped) == (3, [1, 2], 2)


def test_triggered_keeps_every_part_and_overflows_without_its_image() -> None:
    queue = FrameQueue(Policy(kind="triggered", queue=2))
    for number in (1, 2, 3, 4):
        queue.put(frame(number))
    taken = [queue.take(0.0) for _ in range(4)]
    assert [(f.number, f.pixels is None) for f in taken if f] == [
        (1, False), (2, False), (3, True), (4, True),
    ]  # fmt: skip
    assert queue.overflowed == 2


def test_wait_holds_the_source_back_until_there_is_room() -> None:
    queue = FrameQueue(Policy(kind="wait", queue=1))
    queue.put(frame(1))
    second = threading.Thread(target=queue.put, args=(frame(2),))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    queue.take(0.0)
    second.join(5.0)
    assert not second.is_alive()


def test_percentiles_are_at_most_two_percent_too_high() -> None:
    histogram = LatencyHistogram()
    for value in range(1, 1001):
        histogram.add(float(value))
    for percent, exact in ((50, 500.0), (99, 990.0), (99.9, 999.0)):
        found = histogram.percentile_ms(percent)
        assert found is not None
        assert exact <= found <= 1.0201 * exact


def test_the_line_sees_what_the_calibration_saw(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    preprocess = Preprocess(image_size=24, crop_fraction=0.9)
    decoded = decode_pixels((tmp_path / "a.png").read_bytes(), name="a.png")
    difference = preprocessed(decoded, preprocess) - read_image(tmp_path / "a.png", preprocess)
    assert np.abs(difference).max() * max(preprocess.std) * 255 <= 1.0


def test_a_changed_file_of_the_bundle_is_refused(bundle: Bundle) -> None:
    bundle.path("model.onnx").write_bytes(b"another")
    with pytest.raises(MismatchError, match="changed since the bundle was built"):
        open_bundle(bundle.folder)


def test_a_bundle_of_another_device_is_refused_with_exit_code_7(bundle: Bundle) -> None:
    manifest = msgspec.structs.replace(bundle.manifest, fingerprint="0" * 16)
    other = msgspec.structs.replace(bundle, manifest=manifest)
    with pytest.raises(DeviceMismatchError) as caught:
        refuse_other_device(other)
    assert caught.value.exit_code == 7


def test_an_engine_that_answers_the_golden_frames_otherwise_is_refused(
    bundle: Bundle, tmp_path: Path
) -> None:
    other = FakeEngine(bundle.path("model.onnx"), classes=2)
    line = Line(bundle, folder_config(tmp_path), load=lambda: other)
    with pytest.raises(MismatchError, match="golden frames"):
        line.start()
    line.close()


def test_unknown_keys_are_refused_with_their_place() -> None:
    tables = {"source": {"kind": "folder", "target": "x", "pol_s": 1.0}}
    with pytest.raises(FileFormatError, match=r"pol_s.*\$\.source"):
        line_config(tables, name="line.toml")


def test_sources_and_sinks_are_read_from_the_command_line() -> None:
    assert parse_source("synthetic:a.py:f@25")["rate"] == 25.0
    assert parse_sink("evidence:e?max_gb=0.5")["max_gb"] == 0.5


def test_passwords_are_not_shown() -> None:
    text = redacted("rtsp://bob:secret@host/live?token=secret&x=1")
    assert text == "rtsp://***@host/live?token=***&x=1"


@pytest.mark.parametrize(
    "setting", ["user-pw=geheim", 'user-pw = "ge heim"', "proxy-pw='geheim'", "passphrase=geheim"]
)
def test_passwords_of_a_pipeline_are_not_shown(setting: str) -> None:
    pipeline = f"rtspsrc location=rtsp://10.0.0.5/live {setting} latency=0 ! decodebin"
    assert "heim" not in redacted(pipeline)
    assert redacted(pipeline).endswith("*** latency=0 ! decodebin")


def test_the_record_names_a_pipeline_without_what_may_be_a_secret(
    bundle: Bundle, tmp_path: Path
) -> None:
    pipeline = 'rtspsrc location=rtsp://a:b@h/live extra="Authorization: geheim" ! decodebin'
    line = Line(bundle, config(tmp_path, source={"kind": "gstreamer", "target": pipeline}))
    assert line.source == "rtspsrc location=rtsp://***@h/live"
    line.close()


def test_a_webhook_whose_path_is_its_secret_is_named_without_it() -> None:
    name = address_name("https://hooks.example/services/T0/B0/geheim")
    assert re.fullmatch(r"https://hooks\.example/\*\*\* \([0-9a-f]{8}\)", name)
    assert address_name("http://127.0.0.1:80/") == "http://127.0.0.1:80/"


def test_every_image_of_a_folder_gets_one_verdict_and_is_put_away(
    bundle: Bundle, tmp_path: Path
) -> None:
    out = tmp_path / "v.jsonl"
    line = Line(bundle, folder_config(tmp_path, sink=[{"kind": "jsonl", "target": str(out)}]))
    for number in range(5):
        write_image(tmp_path / "in" / f"part{number}.png", 10 * number)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    line.start()
    run_until(line, lambda: len(frames_of(line)) == 6)
    line.close()
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    records = [entry["record"] for entry in lines if entry["kind"] == "frame"]
    assert sorted(r["number"] for r in records) == [1, 2, 3, 4, 5, 6]
    broken = next(r for r in records if r["part_id"] == "broken.png")
    assert (broken["verdict"], broken["action"]) == ("safe", "reject")
    assert "corrupt frame" in broken["reason"]
    assert {r["verdict"] for r in records if r is not broken} == {"ok"}
    assert len(list((tmp_path / "in" / "done").iterdir())) == 6


def test_images_that_are_judged_while_the_line_closes_are_put_away_too(
    bundle: Bundle, tmp_path: Path
) -> None:
    line = Line(bundle, folder_config(tmp_path))
    for number in range(3):
        write_image(tmp_path / "in" / f"part{number}.png", 10 * number)
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    line.start()
    end_s = time.monotonic() + 15.0
    while line.settlement.counts.safe == 0:  # the broken one, which came last, has its verdict
        assert time.monotonic() < end_s, line.status()
        time.sleep(0.01)
    line.close()
    assert len(list((tmp_path / "in" / "done").iterdir())) == 4
    assert list((tmp_path / "in" / "claimed").iterdir()) == []


def test_an_image_claimed_before_a_crash_is_judged_under_its_number(
    bundle: Bundle, tmp_path: Path
) -> None:
    settings = folder_config(tmp_path)
    with SequenceFile(tmp_path / "state" / "sequence") as sequence:
        number = sequence.next()
    (tmp_path / "in" / "claimed").mkdir()
    write_image(tmp_path / "in" / "claimed" / f"{number}.part.png", 50)
    line = Line(bundle, settings)
    line.start()
    run_until(line, lambda: len(frames_of(line)) == 1)
    (record,) = frames_of(line)
    line.close()
    assert (record["number"], record["verdict"], record["part_id"]) == (1, "ok", "part.png")


def test_engine_errors_become_safe_verdicts_and_the_engine_is_opened_anew(
    bundle: Bundle, tmp_path: Path
) -> None:
    opened: list[FakeEngine] = []

    class Failing(FakeEngine):
        def infer_all(self, x: Any) -> Any:
            if len(opened) == 1 and self.used:
                raise EngineError("the device was reset")
            self.used = True
            return super().infer_all(x)

        used = False

    def load() -> FakeEngine:
        opened.append(Failing(bundle.path("model.onnx")))
        return opened[-1]

    line = Line(bundle, folder_config(tmp_path), load=load)
    for number in range(6):
        write_image(tmp_path / "in" / f"{number}.png", number)
    line.start()
    run_until(line, lambda: len(frames_of(line)) == 6)
    verdicts = [r["verdict"] for r in frames_of(line)]
    line.close()
    assert verdicts.count("safe") == 3
    assert verdicts.count("ok") == 3
    assert len(opened) == 2


def test_what_a_full_disk_refused_is_safe_and_written_in_order_later(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    line = Line(bundle, folder_config(tmp_path))
    line.start()
    whole = line.journal._db

    class Full:
        def execute(self, statement: str, *values: Any) -> Any:
            if statement.startswith("INSERT OR IGNORE"):
                raise sqlite3.OperationalError("database or disk is full")
            return whole.execute(statement, *values)

    monkeypatch.setattr(line.journal, "_db", Full())
    for number in range(3):
        write_image(tmp_path / "in" / f"{number}.png", number)
    run_until(line, lambda: line.settlement.counts.unrecorded == 3)
    monkeypatch.setattr(line.journal, "_db", whole)
    assert line.journal.flush()
    records, events = frames_of(line), events_of(line)
    line.close()
    assert [(r["number"], r["verdict"]) for r in records] == [(1, "safe"), (2, "safe"), (3, "safe")]
    assert any(e["kind"] == "disk" and e["severity"] == "alarm" for e in events)


def test_a_late_part_gets_the_safe_verdict_at_its_deadline_and_only_that(
    bundle: Bundle, tmp_path: Path
) -> None:
    gate = threading.Event()

    class Slow(FakeEngine):
        def infer_all(self, x: Any) -> Any:
            if self.warm:
                gate.wait(10.0)
            self.warm = True
            return super().infer_all(x)

        warm = False

    settings = folder_config(tmp_path)
    settings = msgspec.structs.replace(settings, policy=Policy(kind="wait", deadline_ms=30.0))
    slow: Any = Slow(bundle.path("model.onnx"))
    line = Line(bundle, settings, load=lambda: slow)
    write_image(tmp_path / "in" / "a.png", 1)
    line.start()
    judging = threading.Thread(target=lambda: run_until(line, lambda: gate.is_set()))
    judging.start()
    end_s = time.monotonic() + 10
    while not frames_of(line) and time.monotonic() < end_s:
        time.sleep(0.01)
    (record,) = frames_of(line)  # decided while the engine still works on it
    gate.set()
    judging.join()
    assert len(frames_of(line)) == 1
    line.close()
    assert record["verdict"] == "safe"
    assert "30 ms" in record["reason"]


def test_a_jump_of_the_time_of_day_is_recorded(bundle: Bundle, tmp_path: Path) -> None:
    class Jumping(SystemClock):
        offset_s = 0.0

        def unix_s(self) -> float:
            return super().unix_s() + self.offset_s

    clock = Jumping()
    line = Line(bundle, folder_config(tmp_path), clock=clock)
    line.start()
    clock.offset_s = -3600.0
    run_until(line, lambda: any(e["kind"] == "clock" for e in events_of(line)))
    texts = [e["text"] for e in events_of(line) if e["kind"] == "clock"]
    line.close()
    assert len(texts) == 1
    assert "jumped by -3600.0 s" in texts[0]


def camera_config(tmp_path: Path, camera: str, **source: Any) -> LineConfig:
    tables = {"kind": "synthetic", "target": camera, "rate": 50.0, **source}
    return config(tmp_path, source=tables, policy={"kind": "triggered", "queue": 64})


def test_a_killed_capture_process_is_replaced_and_every_missed_trigger_is_safe(
    bundle: Bundle, tmp_path: Path, camera: str
) -> None:
    line = Line(bundle, camera_config(tmp_path, camera))
    line.start()
    run_until(line, lambda: line.settlement.counts.ok >= 10)
    first = line.feed.health.process
    assert first is not None
    os.kill(first, signal.SIGKILL)
    before = line.settlement.counts.ok
    run_until(line, lambda: line.settlement.counts.ok >= before + 10)
    assert line.feed.health.process not in (None, first)
    line.close()
    assert line.settlement.counts.safe >= 1


def test_an_unplugged_camera_puts_the_line_on_hold_and_is_reported(
    bundle: Bundle, tmp_path: Path, camera: str
) -> None:
    line = Line(bundle, camera_config(tmp_path, camera, frames=3))
    line.start()
    run_until(line, lambda: line.feed.health.state == "lost" and line.outputs.held is not None)
    texts = [e["text"] for e in events_of(line) if e["kind"] == "source"]
    line.close()
    assert any("unplugged" in text for text in texts)


def test_after_a_kill_of_the_line_every_taken_part_has_one_verdict(
    bundle: Bundle, tmp_path: Path, camera: str
) -> None:
    command = [
        sys.executable, "-m", "lpvit_edge", "run", str(bundle.folder), "--source",
        f"synthetic:{camera}@100", "--policy", "triggered", "--state", str(tmp_path / "state"),
    ]  # fmt: skip
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    sequence = tmp_path / "state" / "sequence"
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s:
        if sequence.exists() and sequence.stat().st_size:
            with SequenceFile(sequence) as opened:
                if opened.taken >= 20:
                    break
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.2)  # the kernel ends the capture process with its parent
    with SequenceFile(sequence) as opened:
        taken = opened.taken
    assert taken >= 20
    line = Line(bundle, camera_config(tmp_path, camera))
    line._settle_left_open()
    records = frames_of(line)
    line.close()
    assert sorted(r["number"] for r in records) == list(range(1, taken + 1))
    assert all(r["untimed"] == (r["reason"] == "the line was down") for r in records)


@pytest.fixture
def receiver() -> Iterator[tuple[HTTPServer, list[Any]]]:
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            refuse = self.server.refuse > 0  # type: ignore[attr-defined]
            self.server.refuse -= 1  # type: ignore[attr-defined]
            if not refuse:
                got.extend(json.loads(body))
            self.send_response(503 if refuse else 204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.refuse = 2  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, got
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_webhook_that_refuses_gets_everything_later_in_order(
    bundle: Bundle, tmp_path: Path, receiver: tuple[HTTPServer, list[Any]]
) -> None:
    pytest.importorskip("httpx")
    server, got = receiver
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    line = Line(bundle, folder_config(tmp_path, sink=[{"kind": "webhook", "target": url}]))
    for number in range(4):
        write_image(tmp_path / "in" / f"{number}.png", number)
    line.start()
    run_until(line, lambda: sum(e["kind"] == "frame" for e in got) == 4)
    line.close()
    assert [e["entry"] for e in got] == sorted({e["entry"] for e in got})


def test_jsonl_mends_a_cut_line_and_repeats_nothing(tmp_path: Path) -> None:
    from lpvit_edge.line.sink_config import JsonlSink
    from lpvit_edge.line.sinks.jsonl import JsonLines

    path = tmp_path / "v.jsonl"
    path.write_bytes(b'{"entry":7,"kind":"frame","record":{}}\n{"entry":8,"ki')
    assert JsonLines(JsonlSink(target=str(path))).resume(5, 9) == 7
    assert path.read_bytes().count(b"\n") == 1
    assert path.read_bytes().endswith(b"}\n")


def test_a_journal_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"no database" * 100)
    with pytest.raises(FileFormatError, match=r"file is not a database.*move the file away"):
        Journal(tmp_path / "j")


def test_a_journal_that_the_disk_refuses_is_not_to_be_moved_away(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    with pytest.raises(EnvironmentUnfitError, match=r"unable to open.*is the disk full"):
        Journal(tmp_path / "j")


def test_a_journal_with_a_damaged_page_says_so_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path)
    for number in range(1, 400):
        journal.append(LineEvent(kind="gap", text=str(number), severity="info", at=0.0))
    journal.close()
    content = path.read_bytes()
    path.write_bytes(content[: 8 * 4096] + b"\xff" * (len(content) - 8 * 4096))
    damaged = Journal(path)
    with pytest.raises(FileFormatError, match=r"malformed.*move the file away"):
        damaged.after(0, limit=1000)
    damaged.close()
