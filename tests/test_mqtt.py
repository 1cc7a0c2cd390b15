"""Verdicts over MQTT, against a real Mosquitto that goes away and comes back."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from lpvit_edge.errors import EnvironmentUnfitError, SinkError, UnknownOptionError
from lpvit_edge.line.address import parse_address
from lpvit_edge.line.config import parse_sink
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.records import FrameRecord, LineEvent, StageLatency
from lpvit_edge.line.redact import redacted
from lpvit_edge.line.sink_config import MqttSink
from lpvit_edge.line.sinks.mqtt import Mqtt
from lpvit_edge.line.sinks.remote import RemoteSink
from tests.broker import PASSWORD, USER, Broker, Subscriber, free_port, wait_for

ROOT = Path(__file__).parent.parent
pytest.importorskip("paho.mqtt.client", reason="extra mqtt is not installed")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


def config(port: int) -> MqttSink:
    return MqttSink(target=f"mqtt://{USER}:${{MQTT_PASSWORD}}@127.0.0.1:{port}/line3")


def frame(number: int) -> FrameRecord:
    return FrameRecord(
        number=number, source="s", captured_at=time.time(), captured_ns=time.monotonic_ns(),
        verdict="ok", action="pass", latency=StageLatency(total_ms=1.0),
    )  # fmt: skip


def test_verdicts_and_events_arrive_on_their_topics_and_the_status_says_offline_at_the_end(
    broker: Broker, subscriber: Subscriber, journal: Journal
) -> None:
    sink = RemoteSink(Mqtt(config(broker.port)), journal)
    wait_for(lambda: subscriber.statuses == ["online"], what=sink.error)
    journal.append(frame(1))
    journal.append(LineEvent(kind="gap", text="two triggers missed", severity="alarm", at=1.0))
    sink.hold(True)
    wait_for(lambda: subscriber.statuses == ["online", "held"], what=sink.error)
    assert sink.close(5.0) == 0
    wait_for(lambda: subscriber.statuses == ["online", "held", "offline"])
    assert [(e["topic"], e["entry"]) for e in subscriber.entries] == [
        ("line3/verdict", 1), ("line3/event", 2),
    ]  # fmt: skip


def test_a_broker_that_is_killed_under_load_misses_nothing_and_gets_it_in_order(
    broker: Broker, subscriber: Subscriber, journal: Journal
) -> None:
    sink = RemoteSink(Mqtt(config(broker.port)), journal)
    stop = threading.Event()

    def decide() -> None:
        number = 0
        while not stop.wait(0.004):
            number += 1
            journal.append(frame(number))

    deciding = threading.Thread(target=decide)
    deciding.start()
    wait_for(lambda: len(subscriber.numbers()) > 50, what=sink.error)
    broker.kill()
    time.sleep(2.0)
    assert sink.error is not None
    broker.start()
    seen = len(subscriber.numbers())
    wait_for(lambda: len(subscriber.numbers()) > seen + 50, what=sink.error)
    stop.set()
    deciding.join()
    assert sink.close(10.0) == 0
    last = journal.last_id()
    wait_for(lambda: len(subscriber.numbers()) == last, what=(len(subscriber.numbers()), last))
    assert subscriber.numbers() == list(range(1, last + 1))
    assert subscriber.statuses[-1] == "offline"


def test_what_a_frozen_broker_took_without_an_acknowledgement_is_sent_again(
    broker: Broker, subscriber: Subscriber, journal: Journal
) -> None:
    settings = msgspec.structs.replace(config(broker.port), timeout_s=0.5)
    sink = RemoteSink(Mqtt(settings), journal)
    journal.append(frame(1))
    wait_for(lambda: subscriber.numbers() == [1] and journal.delivered(sink.name) == 1)
    broker.freeze()
    journal.append(frame(2))
    wait_for(lambda: sink.error is not None or journal.delivered(sink.name) > 1)
    assert journal.delivered(sink.name) == 1
    broker.kill()
    broker.start()
    wait_for(lambda: subscriber.numbers() == [1, 2], what=sink.error)
    assert sink.close(5.0) == 0


_CHILD = """
import sys, time
from pathlib import Path
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.sinks.mqtt import Mqtt
from lpvit_edge.line.sinks.remote import RemoteSink
from tests.test_mqtt import config, frame
journal = Journal(Path(sys.argv[1]))
sink = RemoteSink(Mqtt(config(int(sys.argv[2]))), journal)
for number in range(1, 100_000):
    journal.append(frame(number))
    time.sleep(0.001)
"""


def test_after_a_kill_of_the_line_the_will_says_offline_and_the_next_run_sends_the_rest(
    broker: Broker, subscriber: Subscriber, tmp_path: Path
) -> None:
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    journal_path = tmp_path / "journal.sqlite"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(journal_path), str(broker.port)],
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        wait_for(lambda: len(subscriber.numbers()) > 50, seconds=30.0)
    finally:
        child.kill()
        child.wait()
    wait_for(lambda: subscriber.statuses == ["online", "offline"], what=subscriber.statuses)
    journal = Journal(journal_path)
    for number in range(200_001, 200_011):  # decided while nothing is sent
        journal.append(frame(number))
    sink = RemoteSink(Mqtt(config(broker.port)), journal)
    assert sink.close(10.0) == 0
    decided = journal.last_id()
    journal.close()
    wait_for(lambda: len(subscriber.numbers()) == decided)
    assert subscriber.numbers() == [*range(1, decided - 9), *range(200_001, 200_011)]


def test_a_wrong_password_is_refused_in_words_without_the_password(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MQTT_PASSWORD", "guessed-secret")
    remote = Mqtt(config(broker.port))
    with pytest.raises(SinkError, match="the broker refused: Not authorized") as caught:
        remote.beat(is_held=False)
    remote.disconnect()
    assert "guessed" not in f"{caught.value} {remote.name}"
    assert remote.name == f"mqtt mqtt://***@127.0.0.1:{broker.port}/line3"


def test_a_broker_that_is_not_there_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQTT_PASSWORD", PASSWORD)
    remote = Mqtt(config(free_port()))
    with pytest.raises(SinkError, match="Connection refused"):
        remote.beat(is_held=False)
    remote.disconnect()


def test_a_topic_is_needed_and_may_not_be_a_pattern() -> None:
    for target in ("mqtt://host", "mqtt://host/line/#"):
        with pytest.raises(UnknownOptionError, match="write a topic"):
            Mqtt(MqttSink(target=target))


def test_an_address_is_taken_apart_with_passwords_of_any_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "p@ss/w:rd")
    address = parse_address("mqtts://bob:${SECRET}@[::1]/a/b", {"mqtts": 8883}, option="mqtt")
    assert (address.host, address.port, address.user) == ("::1", 8883, "bob")
    assert (address.password, address.path) == ("p@ss/w:rd", "a/b")
    with pytest.raises(EnvironmentUnfitError, match="NOT_SET_ANYWHERE"):
        parse_address("mqtt://bob:${NOT_SET_ANYWHERE}@h", {"mqtt": 1883}, option="mqtt")


@pytest.mark.parametrize("target", ["mqtt://bob:se@cret@h/t", "mqtt://bob:se/cret@h/t", "bob@h"])
def test_an_address_that_is_none_is_refused_without_its_password(target: str) -> None:
    assert "cret" not in redacted(target)
    with pytest.raises(UnknownOptionError) as caught:
        parse_address(target.replace("mqtt", "ftp"), {"mqtt": 1883}, option="mqtt")
    assert "cret" not in str(caught.value)


def test_the_command_line_takes_an_address_as_it_is() -> None:
    table = parse_sink("mqtts://bob:${PW}@host/line3?timeout_s=2")
    assert (table["kind"], table["target"]) == ("mqtt", "mqtts://bob:${PW}@host/line3")
    assert table["timeout_s"] == 2.0
