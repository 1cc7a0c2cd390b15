"""A driver that hangs: its process is killed and replaced, and the line is safe meanwhile."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import MissingDependencyError
from lpvit_edge.line.config import SyntheticSource
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.line import Line
from lpvit_edge.line.policy import Policy
from lpvit_edge.line.ring import FrameMessage, RingReader, RingWriter, StatusMessage
from lpvit_edge.line.sequence import SequenceFile
from tests.capturing import ROOT, capturing, process_exists
from tests.line_bundle import make_bundle
from tests.test_line import camera_config, events_of, frames_of, run_until

# Blocks in C and keeps Python's lock, as a driver's call does that was not made for threads: no
# signal handler and no other thread of the process runs any more. Once only: `marker` says so.
CAMERA = """
import ctypes, os, time
from pathlib import Path
import numpy as np

MARKER = Path({marker!r})
seen = 0

def wedge():
    MARKER.write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(3600)

def close_channel_and_wedge():
    MARKER.write_text(str(os.getpid()))
    os.closerange(3, 256)
    ctypes.PyDLL(None).sleep(3600)

if {when!r} == "opening" and not MARKER.exists():
    wedge()

def frame(number):
    global seen
    seen += 1
    if seen == 10 and not MARKER.exists():
        {{"reading": wedge, "leaving": close_channel_and_wedge}}.get({when!r}, int)()
    return np.full((6, 8, 3), number % 255, np.uint8)
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def camera(tmp_path: Path) -> Callable[[str], str]:
    def make(when: str) -> str:
        path = tmp_path / "wedging.py"
        path.write_text(CAMERA.format(marker=str(tmp_path / "wedged"), when=when))
        return f"{path}:frame"

    return make


def wedged(tmp_path: Path) -> int | None:
    """The process that hangs, once there is one."""
    try:
        return int((tmp_path / "wedged").read_text())
    except (FileNotFoundError, ValueError):
        return None


def test_a_capture_process_that_hangs_in_its_driver_is_replaced_and_the_safe_verdict_holds(
    bundle: Bundle, tmp_path: Path, camera: Callable[[str], str]
) -> None:
    settings = camera_config(tmp_path, camera("reading"))
    line = Line(bundle, msgspec.structs.replace(settings, stall_s=2.0))
    line.start()
    run_until(line, lambda: line.outputs.held is not None and wedged(tmp_path) is not None)
    first = wedged(tmp_path)
    assert first is not None
    assert process_exists(first)  # held before anything was killed
    assert line.outputs.held == "source lost: the capture process is silent"
    assert not line.status().source
    run_until(line, lambda: line.feed.health.restarts == 1)
    assert not process_exists(first)
    before = line.settlement.counts.ok
    run_until(line, lambda: line.settlement.counts.ok >= before + 5)
    run_until(line, lambda: line.outputs.held is None)
    line.close()
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    entries = [json.loads(entry.body) for entry in journal.after(0, limit=100_000)]
    journal.close()
    frames = [entry for entry in entries if "number" in entry]
    events = [entry for entry in entries if "kind" in entry]
    assert [f["number"] for f in frames] == list(range(1, len(frames) + 1))
    unseen = [f for f in frames if f["reason"] == "trigger was never seen"]
    assert len(unseen) >= 90  # two seconds of triggers, 50 a second, and some
    assert {(f["verdict"], f["action"]) for f in unseen} == {("safe", "reject")}
    gaps = [e["text"] for e in events if e["kind"] == "gap"]
    assert sum(int(text.split()[0]) for text in gaps if "never seen" in text) == len(unseen)
    (restart,) = [e for e in events if e["kind"] == "capture"]
    assert restart["text"].startswith("the capture process was silent for 2 s and was killed")
    assert restart["severity"] == "alarm"


def test_a_driver_that_hangs_while_it_opens_has_more_time_and_is_replaced_too(
    tmp_path: Path, camera: Callable[[str], str]
) -> None:
    source = SyntheticSource(target=camera("opening"), rate=50.0)
    with capturing(source, tmp_path, stall_s=0.25) as captured:
        captured.until(lambda: wedged(tmp_path) is not None)
        began_s = time.monotonic()
        captured.until(lambda: captured.feed.health.restarts >= 1)
        assert time.monotonic() - began_s >= 1.0
        assert captured.frames(3)[-1].pixels is not None
    texts = captured.told.texts("capture")
    assert texts[0].startswith("the capture process was silent for 1.5 s and was killed")


def test_a_capture_process_that_says_goodbye_and_does_not_end_is_killed(
    tmp_path: Path, camera: Callable[[str], str]
) -> None:
    source = SyntheticSource(target=camera("leaving"), rate=50.0)
    with capturing(source, tmp_path) as captured:
        captured.until(lambda: captured.feed.health.restarts == 1)
        first = wedged(tmp_path)
        assert first is not None
        assert not process_exists(first)
        assert captured.frames(3)[-1].pixels is not None
    (text,) = captured.told.texts("capture")
    assert "the capture process ended (closed its channel)" in text


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)]
)
def test_a_line_that_ends_takes_its_hanging_capture_process_with_it(
    bundle: Bundle,
    tmp_path: Path,
    camera: Callable[[str], str],
    number: signal.Signals,
    code: int,
) -> None:
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    process = subprocess.Popen(
        [
            sys.executable, "-m", "lpvit_edge", "run", str(bundle.folder), "--source",
            f"synthetic:{camera('reading')}@50", "--policy", "triggered",
            "--state", str(tmp_path / "state"),
        ],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: wedged(tmp_path) is not None)
        hanging = wedged(tmp_path)
        assert hanging is not None
        assert process_exists(hanging)
        process.send_signal(number)
        assert process.wait(20) == code
        wait_until(lambda: not process_exists(hanging))
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_a_line_whose_camera_hangs_can_be_closed_and_recorded_all_it_took(
    bundle: Bundle, tmp_path: Path, camera: Callable[[str], str]
) -> None:
    line = Line(bundle, camera_config(tmp_path, camera("reading")))
    line.start()
    run_until(line, lambda: wedged(tmp_path) is not None and line.summary().frames >= 9)
    numbers = [record["number"] for record in frames_of(line)]
    assert not [e for e in events_of(line) if e["kind"] == "capture"]
    line.close()
    with SequenceFile(tmp_path / "state" / "sequence") as sequence:
        assert numbers == list(range(1, sequence.taken + 1))


@pytest.fixture
def ring() -> Iterator[tuple[RingWriter, RingReader, socket.socket]]:
    """Both ends, and the writer's socket."""
    memory = os.memfd_create("frames")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    writer, reader = RingWriter(memory, theirs), RingReader(memory, ours)
    yield writer, reader, theirs
    reader.close()
    ours.close()
    os.close(memory)


def received(reader: RingReader) -> FrameMessage:
    message = reader.receive(1.0)
    assert isinstance(message, FrameMessage)
    return message


PIXELS = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)


def test_a_frame_that_was_handed_over_before_its_process_ended_is_whole(
    ring: tuple[RingWriter, RingReader, socket.socket],
) -> None:
    writer, reader, theirs = ring
    writer.write(PIXELS, FrameMessage(number=1, captured_at=0.0, captured_ns=0))
    theirs.close()
    assert (reader.pixels(received(reader)) == PIXELS).all()


@pytest.mark.parametrize("ends_while", ["nobody reads", "its pixels are copied"])
def test_frames_of_a_process_that_ended_with_slots_not_taken_back_are_whole(
    ring: tuple[RingWriter, RingReader, socket.socket], ends_while: str
) -> None:
    """The kernel tells that once, by an error, ahead of what still waits to be read."""
    writer, reader, theirs = ring
    for number in (1, 2, 3):
        writer.write(PIXELS + number, FrameMessage(number=number, captured_at=0.0, captured_ns=0))
    reader.pixels(received(reader))
    if ends_while == "nobody reads":
        theirs.close()
    second = received(reader)
    theirs.close()
    assert (reader.pixels(second) == PIXELS + 2).all()
    assert (reader.pixels(received(reader)) == PIXELS + 3).all()
    with pytest.raises(EOFError):
        reader.receive(1.0)


def test_frames_dropped_by_a_process_that_was_replaced_stay_counted(tmp_path: Path) -> None:
    source = SyntheticSource(target=f"{tmp_path / 'none.py'}:frame")
    with capturing(source, tmp_path) as captured:
        feed = captured.feed
        captured.until(lambda: feed.health.process is not None)
        feed._note(StatusMessage(state="lost", text="-", dropped=3))
        first = feed.health.process
        assert first is not None
        os.kill(first, signal.SIGKILL)
        captured.until(lambda: feed.health.restarts == 1 and feed.health.process is not None)
        captured.until(lambda: "no such Python file" in feed.health.text)
        assert feed.health.dropped == 3


def test_a_file_that_the_cameras_own_code_misses_is_told_and_the_process_stays(
    tmp_path: Path,
) -> None:
    (tmp_path / "camera.py").write_text(
        "def frame(number):\n    open('/nowhere/calibration.bin')\n"
    )
    with capturing(SyntheticSource(target=f"{tmp_path / 'camera.py'}:frame"), tmp_path) as captured:
        captured.until(lambda: "calibration.bin" in captured.feed.health.text)
        captured.until(lambda: "live: open" in captured.told.texts("source"))
        assert captured.feed.health.restarts == 0
    assert captured.told.texts("capture") == []


def test_a_library_that_the_source_lacks_ends_the_line_with_the_reason(
    bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "camera.py").write_text(
        "from lpvit_edge.errors import MissingDependencyError\n"
        "def frame(number):\n    raise MissingDependencyError('no libcamera; install it')\n"
    )
    line = Line(bundle, camera_config(tmp_path, f"{tmp_path / 'camera.py'}:frame"))
    line.start()
    try:
        with pytest.raises(MissingDependencyError, match="no libcamera; install it"):
            line.run()
    finally:
        line.close()


def test_a_capture_process_that_ends_before_it_has_its_orders_is_replaced(
    tmp_path: Path, camera: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen

    def killed_at_once(command: list[str], **options: Any) -> Any:
        monkeypatch.undo()
        process = popen(["true"], **options)
        process.wait()
        return process

    monkeypatch.setattr(subprocess, "Popen", killed_at_once)
    with capturing(SyntheticSource(target=camera("never"), rate=50.0), tmp_path) as captured:
        assert captured.frames(3)[-1].pixels is not None
        assert captured.feed.health.restarts == 1


def test_parts_that_a_capture_thread_left_when_it_died_get_the_safe_verdict_at_the_next_start(
    bundle: Bundle, tmp_path: Path, camera: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = camera_config(tmp_path, camera("never"))
    line = Line(bundle, settings)
    frame = line.feed._frame  # type: ignore[attr-defined]

    def broken(reader: RingReader, message: FrameMessage) -> Any:
        if message.number >= 5:
            raise KeyError("a bug")
        return frame(reader, message)

    monkeypatch.setattr(line.feed, "_frame", broken)
    line.start()
    run_until(line, lambda: bool(line.threads.died()))
    taken = line.sequence.taken
    line.close()
    assert taken >= 5
    again = Line(bundle, settings)
    again._settle_left_open()
    found = {one["number"]: one["reason"] for one in frames_of(again) if one["number"] <= taken}
    again.close()
    assert sorted(found) == list(range(1, taken + 1))
    assert {found[number] for number in range(5, taken + 1)} == {"the line was down"}


def test_a_line_can_be_closed_while_its_source_waits_for_room(
    bundle: Bundle, tmp_path: Path, camera: Callable[[str], str]
) -> None:
    """As after an error that ended it: nobody takes from the queue any more."""
    policy = Policy(kind="wait", queue=1)
    settings = msgspec.structs.replace(camera_config(tmp_path, camera("never")), policy=policy)
    line = Line(bundle, settings)
    line.start()
    wait_until(lambda: line.sequence.taken >= 4)
    closing = threading.Thread(target=line.close)
    closing.start()
    closing.join(20.0)
    assert not closing.is_alive()
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    bodies = [json.loads(entry.body) for entry in journal.after(0) if entry.kind == "frame"]
    journal.close()
    assert {body["verdict"] for body in bodies} == {"ok"}
    assert [body["number"] for body in bodies] == list(range(1, len(bodies) + 1))
    assert len(bodies) >= 3
