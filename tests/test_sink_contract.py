"""One contract for every sink: what a line may rely on, whatever is at the other end."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpvit_edge.errors import MissingDependencyError, UnknownOptionError
from lpvit_edge.line.config import line_config, parse_sink
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.sinks import Sink, open_sinks
from tests.broker import free_port, wait_for
from tests.plant import frame

PIXELS = np.zeros((6, 8, 3), np.uint8)
EXTRAS = {
    "webhook": ("httpx", "webhook"),
    "mqtt": ("paho.mqtt.client", "mqtt"),
    "modbus": ("pymodbus.client", "modbus"),
    "opcua": ("asyncua.ua", "opcua"),
    "gpio": ("gpiod", "gpio"),
}
# Kind -> its options on the command line, with nobody at the other end.
REMOTE: dict[str, Callable[[int], str]] = {
    "webhook": lambda port: f"webhook:http://bob:secret@127.0.0.1:{port}/",
    "mqtt": lambda port: f"mqtt://bob:secret@127.0.0.1:{port}/line3",
    "modbus": lambda port: f"modbus://127.0.0.1:{port}?timeout_s=0.5",
    "opcua": lambda port: f"opc.tcp://127.0.0.1:{port}?nodes.verdict=ns=2;s=V",
}
KEEPS = {"webhook", "mqtt"}  # everything, however old
LOCAL: dict[str, Callable[[Path], str]] = {
    "jsonl": lambda folder: f"jsonl:{folder / 'verdicts.jsonl'}",
    "evidence": lambda folder: f"evidence:{folder / 'evidence'}",
    "gpio": lambda folder: "gpio:/dev/gpiochip0?line=17&delay_ms=10",
}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


class Request:
    def set_value(self, line: int, value: Any) -> None:
        """The level is held."""

    def release(self) -> None:
        """The line is free."""


def opened(text: str, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Sink:
    table = parse_sink(text)
    if table["kind"] in EXTRAS:
        library = EXTRAS[table["kind"]][0].partition(".")[0]
        pytest.importorskip(library, reason=f"extra {EXTRAS[table['kind']][1]} is not installed")
    if table["kind"] == "gpio":
        import gpiod

        monkeypatch.setattr(gpiod, "request_lines", lambda *_, **__: Request())
    source = {"kind": "folder", "target": "in"}
    config = line_config({"source": source, "sink": [table]}, name="test")
    (sink,) = open_sinks(config.sink, journal)
    return sink


@pytest.mark.parametrize("kind", LOCAL)
def test_a_sink_of_this_machine_takes_verdicts_and_holds_and_ends_with_nothing_left(
    kind: str, tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = opened(LOCAL[kind](tmp_path), journal, monkeypatch)
    for is_held in (True, False, True):
        sink.hold(is_held)
        record = frame(1 + journal.last_id(), "reject")
        journal.append(record)
        sink.deliver(record, PIXELS)
        sink.deliver(record, None)
    assert sink.close(10.0) == 0
    assert (sink.error, sink.missed) == (None, 0)


@pytest.mark.parametrize("kind", REMOTE)
def test_a_sink_with_nobody_at_the_other_end_says_so_in_words_and_delays_nobody(
    kind: str, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = opened(REMOTE[kind](free_port()), journal, monkeypatch)
    record = frame(1, "reject")
    journal.append(record)
    sink.deliver(record, PIXELS)
    sink.hold(True)
    wait_for(lambda: sink.error is not None, seconds=30.0)
    assert sink.error is not None
    assert sink.error.startswith(f"{sink.name}: ")
    assert "secret" not in sink.error
    if kind not in KEEPS:
        wait_for(lambda: sink.missed == 1, what=sink.missed)
    left = sink.close(0.1)
    assert (left, sink.missed) == ((1, 0) if kind in KEEPS else (0, 1))


@pytest.mark.parametrize("kind", EXTRAS)
def test_a_sink_without_its_library_names_the_extra(
    kind: str, tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, extra = EXTRAS[kind]
    text = REMOTE[kind](1) if kind in REMOTE else LOCAL[kind](tmp_path)
    table = parse_sink(text)
    config = line_config(
        {"source": {"kind": "folder", "target": "in"}, "sink": [table]}, name="test"
    )
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'lpvit-edge\[{extra}\]'"):
        open_sinks(config.sink, journal)


def test_every_kind_is_held_to_the_contract() -> None:
    with pytest.raises(UnknownOptionError) as caught:
        parse_sink("pigeon:loft")
    kinds = str(caught.value).partition("kinds are ")[2].split(", ")
    assert set(kinds) == set(REMOTE) | set(LOCAL)
