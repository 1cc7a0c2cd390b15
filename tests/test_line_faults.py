"""The whole process under faults from outside: a full disk, nobody who listens, kill -9."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.line.clock import SystemClock
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.line import Line
from lpvit_edge.line.policy import Policy
from lpvit_edge.store import BundleStore
from tests.line_bundle import make_bundle, write_image
from tests.test_line import (  # noqa: F401  (fixture)
    ROOT,
    camera_config,
    events_of,
    folder_config,
    frames_of,
    receiver,
    run_until,
)
from tests.test_service import free_port

NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    (tmp_path / "in").mkdir()
    return make_bundle(tmp_path / "a" / "bundle")


def started(bundle: Bundle | None, tmp_path: Path, *options: object) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    return subprocess.Popen(
        [
            sys.executable, "-m", "lpvit_edge", "run",
            *([] if bundle is None else [str(bundle.folder)]), "--source",
            f"folder:{tmp_path / 'in'}?poll_s=0.01", "--policy", "wait",
            "--state", str(tmp_path / "state"), *map(str, options),
        ],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def recorded(tmp_path: Path) -> list[dict[str, Any]]:
    """Records and events of a journal that another process may be writing."""
    if not (tmp_path / "state" / "journal.sqlite").exists():
        return []
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    entries = [json.loads(entry.body) for entry in journal.after(0, limit=100_000)]
    journal.close()
    return entries


def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def put(tmp_path: Path, name: str) -> None:
    write_image(tmp_path / name, 50)
    (tmp_path / name).rename(tmp_path / "in" / name)


def done(tmp_path: Path) -> int:
    folder = tmp_path / "in" / "done"
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_a_disk_that_takes_no_more_holds_the_safe_verdict_and_loses_nothing(
    bundle: Bundle, tmp_path: Path
) -> None:
    """The limit of the file size is the fullness: every write of the journal really fails."""
    process = started(bundle, tmp_path, "--sink", f"jsonl:{tmp_path / 'v.jsonl'}")
    try:
        put(tmp_path, "before.png")
        until(lambda: done(tmp_path) == 1)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        for number in range(3):
            put(tmp_path, f"full{number}.png")
        until(lambda: done(tmp_path) == 4)
        assert process.poll() is None
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, NO_LIMIT)
        put(tmp_path, "after.png")
        until(lambda: done(tmp_path) == 5)
        until(lambda: sum("number" in entry for entry in recorded(tmp_path)) == 5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    entries = recorded(tmp_path)
    frames = [entry for entry in entries if "number" in entry]
    assert [(f["number"], f["verdict"]) for f in frames] == [
        (1, "ok"), (2, "safe"), (3, "safe"), (4, "safe"), (5, "ok"),
    ]  # fmt: skip
    assert {f["reason"] for f in frames[1:4]} == {"not recorded on disk (ok by the model)"}
    assert [e["severity"] for e in entries if e.get("kind") == "disk"] == ["alarm", "info"]
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [e["record"]["number"] for e in lines if e["kind"] == "frame"] == [1, 2, 3, 4, 5]


def test_what_nobody_took_before_a_kill_is_delivered_by_the_next_run(
    bundle: Bundle,
    tmp_path: Path,
    receiver: tuple[HTTPServer, list[Any]],  # noqa: F811
) -> None:
    pytest.importorskip("httpx")
    server, got = receiver
    server.refuse = 0  # type: ignore[attr-defined]
    nobody = f"webhook:http://127.0.0.1:{free_port()}/"
    process = started(bundle, tmp_path, "--sink", nobody)
    try:
        for number in range(3):
            put(tmp_path, f"{number}.png")
        until(lambda: done(tmp_path) == 3)  # judged, though nobody listens
    finally:
        process.kill()
        process.wait()
    assert [f["verdict"] for f in recorded(tmp_path) if "number" in f] == ["ok"] * 3
    somebody = f"webhook:http://127.0.0.1:{server.server_address[1]}/"
    process = started(bundle, tmp_path, "--sink", somebody)
    try:
        until(lambda: sum(entry["kind"] == "frame" for entry in got) >= 3)
    finally:
        process.kill()
        process.wait()
    assert [e["record"]["number"] for e in got if e["kind"] == "frame"] == [1, 2, 3]


def test_a_clock_that_jumps_changes_no_duration_and_no_deadline(
    bundle: Bundle, tmp_path: Path
) -> None:
    class Jumping(SystemClock):
        offset_s = 0.0

        def unix_s(self) -> float:
            self.offset_s += 86_400.0  # a day later at every look
            return super().unix_s() + self.offset_s

    policy = Policy(kind="wait", deadline_ms=5000.0)
    settings = msgspec.structs.replace(folder_config(tmp_path), policy=policy)
    line = Line(bundle, settings, clock=Jumping())
    line.start()
    for number in range(5):
        put(tmp_path, f"{number}.png")
    run_until(line, lambda: line.summary().frames == 5)
    run_until(line, lambda: any(e["kind"] == "clock" for e in events_of(line)))
    records = frames_of(line)
    line.close()
    assert [r["verdict"] for r in records] == ["ok"] * 5
    assert all(0.0 <= r["latency"]["total_ms"] < 5000.0 for r in records)


def test_what_is_said_after_the_line_was_closed_is_not_recorded_and_hurts_nobody(
    bundle: Bundle, tmp_path: Path
) -> None:
    line = Line(bundle, folder_config(tmp_path))
    line.start()
    line.close()
    line.settlement.event("drift", "a frame of the last second was strange", "warning")
    assert line.journal.waiting == 0


BROKEN = """
import numpy as np
def frame(n):
    if n % 3 == 0:
        return np.zeros((4, 4), np.float64)  # not a picture: height, width, three bytes
    return np.full((6, 8, 3), n % 255, np.uint8)
"""


def test_a_camera_whose_frames_are_sometimes_no_pictures_gets_a_verdict_for_each(
    bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "camera.py").write_text(BROKEN)
    line = Line(bundle, camera_config(tmp_path, f"{tmp_path / 'camera.py'}:frame"))
    line.start()
    run_until(line, lambda: line.summary().frames >= 9)
    line.close()
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    records = [json.loads(e.body) for e in journal.after(0, limit=1000) if e.kind == "frame"]
    journal.close()
    assert [r["number"] for r in records] == list(range(1, len(records) + 1))
    safe = [r for r in records if r["verdict"] == "safe"]
    assert safe
    assert {r["action"] for r in safe} == {"reject"}
    assert sum(r["verdict"] == "ok" for r in records) >= 5


def test_a_bundle_that_is_killed_before_any_verdict_gives_way_at_the_fourth_start(
    bundle: Bundle, tmp_path: Path
) -> None:
    store = BundleStore(tmp_path / "store")
    newer = make_bundle(tmp_path / "n" / "newer", network=b"newer")
    for one in (bundle, newer):
        store.install(one.folder, lambda _: None)
    starts = tmp_path / "store" / "starts.json"
    for count in (1, 2, 3):
        process = started(None, tmp_path, "--store", store.folder)
        until(lambda: starts.exists() and len(json.loads(starts.read_bytes())["starts"]) == count)  # noqa: B023
        process.kill()
        process.wait()
        assert store.open("current").version == newer.version
    put(tmp_path, "a.png")
    process = started(None, tmp_path, "--store", store.folder)
    try:
        until(lambda: done(tmp_path) == 1)
        until(lambda: not starts.exists())
    finally:
        process.kill()
        process.wait()
    assert store.open("current").version == bundle.version
    entries = recorded(tmp_path)
    assert [e["bundle"] for e in entries if "number" in e] == [bundle.version]
    (event,) = [e for e in entries if e.get("kind") == "bundle"]
    assert event["severity"] == "alarm"
    assert "3 starts within 300 s without a verdict" in event["text"]
