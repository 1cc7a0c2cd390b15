"""Errors that nobody expected, in each thread of a line: seen, told, and the outputs are held."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.dashboard.hub import Hub
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.dashboard.snapshot import DriftNow, ShadowNow
from lpvit_edge.line import swap as swap_module
from lpvit_edge.line.config import line_config
from lpvit_edge.line.folder import FolderFeed
from lpvit_edge.line.journal import Entry, Journal
from lpvit_edge.line.line import Line
from lpvit_edge.line.service import _watchdog
from lpvit_edge.line.settle import Settlement
from lpvit_edge.line.sink_watch import SinkWatch
from lpvit_edge.line.sinks.remote import RemoteSink
from lpvit_edge.line.swap import Swap
from tests.broker import wait_for
from tests.line_bundle import make_bundle, write_image
from tests.plant import frame
from tests.test_line import events_of, folder_config, run_until
from tests.test_service import Manager, manager
from tests.test_sinks import Other

__all__ = ["manager"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def broken(*_: object, **__: object) -> Any:
    raise KeyError("secret")


class Broken(Other):
    """Its library raises what nobody listed, in whichever call is named."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: set[str] = set()

    def send(self, entries: Sequence[Entry]) -> None:
        if "send" in self.breaks:
            "ä".encode("ascii")
        super().send(entries)

    def disconnect(self) -> None:
        if "disconnect" in self.breaks:
            broken()


def test_a_sink_whose_library_raises_anything_tells_it_and_tries_again(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path / "journal.sqlite"), Broken()
    other.breaks = {"send", "disconnect"}
    sink = RemoteSink(other, journal)
    journal.append(frame(1))
    wait_for(lambda: sink.error is not None and "KeyError" in sink.error, what=sink.error)
    text = str(sink.error)
    assert text.startswith("other: unexpected UnicodeEncodeError at tests/test_guarded.py")
    assert "secret" not in text
    other.breaks.clear()
    wait_for(lambda: other.took == [1] and sink.error is None, what=sink.error)
    assert sink.close(5.0) == 0
    journal.close()


def test_a_journal_that_cannot_be_read_does_not_end_a_sink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, other = Journal(tmp_path / "journal.sqlite"), Other()
    sink = RemoteSink(other, journal)
    with monkeypatch.context() as patched:
        patched.setattr(journal, "after", broken)
        wait_for(lambda: sink.error is not None)
    journal.append(frame(1))
    wait_for(lambda: other.took == [1], what=sink.error)
    assert sink.close(5.0) == 0
    journal.close()


@pytest.mark.parametrize(
    ("thread", "place", "call"),
    [
        ("deadlines", Settlement, "settle_late"),
        ("sinks", SinkWatch, "look"),
        ("hold", Line, "_blindness"),
        ("folder", FolderFeed, "_look"),
    ],
)
def test_a_thread_that_ends_is_told_holds_the_outputs_and_gets_no_watchdog(
    thread: str,
    place: type,
    call: str,
    bundle: Bundle,
    tmp_path: Path,
    manager: Manager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    monkeypatch.setenv("WATCHDOG_USEC", "80000")
    (tmp_path / "in").mkdir()
    settings = line_config(
        {
            "state": str(tmp_path / "state"),
            "source": {"kind": "folder", "target": str(tmp_path / "in"), "poll_s": 0.005},
            "policy": {"kind": "wait", "deadline_ms": 2000},
        },
        name="test",
    )
    line = Line(bundle, settings)
    notify = _watchdog(line, None)
    line.start()
    write_image(tmp_path / "in" / "a.png", 1)
    run_until(line, lambda: line.status().frames == 1 and line.outputs.held is None)
    notify()
    assert manager.until("READY")
    assert manager.until("WATCHDOG")
    with monkeypatch.context() as patched:
        patched.setattr(place, call, broken)
        wait_for(lambda: thread in line.status().died, what=line.status())
    wait_for(lambda: any(event["kind"] == "thread" for event in events_of(line)))
    (event,) = (event for event in events_of(line) if event["kind"] == "thread")
    assert event["severity"] == "alarm"
    assert f"the thread {thread} ended (unexpected KeyError" in event["text"]
    assert line.outputs.held == f"the thread {thread} ended"
    assert line.status().alive is False
    threading.Event().wait(0.05)
    notify()
    assert manager.next(seconds=0.1) is None
    line.close()


class BrokenWatch:
    def see(self, record: Any, embedding: Any, image: Any) -> None:
        broken()

    def drift_now(self, *, not_watched: int) -> tuple[DriftNow | None, str | None]:
        return None, "green as ever"

    def shadow_now(self) -> tuple[ShadowNow | None, str | None]:
        return None, None

    def close(self) -> None:
        """Nothing is open."""


def test_a_drift_watch_that_fails_is_told_and_shows_no_old_level() -> None:
    told: list[str] = []
    with Hub(device={}, power=PowerMonitor(None, reason="none"), watcher=BrokenWatch()) as hub:
        hub.failed = told.append
        for number in (1, 2):
            hub.publish_frame(frame(number), None, np.zeros((2, 2, 3), np.uint8))
        wait_for(lambda: bool(told))
        now = hub.now()
        assert now.drift is None
        assert now.drift_reason == told[0] == "the drift watch ended: KeyError: 'secret'"
        assert hub.watcher is None


def test_an_error_of_a_library_while_a_bundle_is_proven_is_told_and_refuses_it(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    refused: list[str] = []
    monkeypatch.setattr(swap_module, "proven_engine", broken)
    swap = Swap(folder_config(tmp_path), lambda kind, text, severity: events.append(text))
    assert swap.offer(lambda: bundle, "it was installed", refused=refused.append)
    wait_for(lambda: bool(refused))
    assert "unexpected KeyError" in refused[0]
    assert refused[0] in events[0]
    swap.close()
