"""A broker that is away, and a whole line behind one: nothing decided is lost."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lpvit_edge.line.clock import SystemClock
from lpvit_edge.line.config import LineConfig, line_config
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.line import Line
from lpvit_edge.line.sink_config import MqttSink
from lpvit_edge.line.sinks.mqtt import Mqtt
from lpvit_edge.line.sinks.remote import RemoteSink
from tests.broker import USER, Broker, Subscriber, wait_for
from tests.line_bundle import make_bundle
from tests.plant import frame

pytest.importorskip("paho.mqtt.client", reason="extra mqtt is not installed")
# Seconds that the broker is away; 60 in .ci/run.
OUTAGE_S = float(os.environ.get("LPVIT_OUTAGE_S", "2"))
CAMERA = "import numpy as np\ndef frame(n):\n    return np.full((6, 8, 3), n % 255, np.uint8)\n"


def target(broker: Broker) -> str:
    return f"mqtt://{USER}:${{MQTT_PASSWORD}}@127.0.0.1:{broker.port}/line3"


class Watched(SystemClock):
    """The real clock, and what was waited for."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.waits_s.append(seconds)
        return super().wait(event, seconds)


def test_a_broker_that_is_away_misses_nothing_of_twenty_parts_a_second(
    broker: Broker, subscriber: Subscriber, tmp_path: Path
) -> None:
    journal, clock = Journal(tmp_path / "journal.sqlite"), Watched()
    sink = RemoteSink(Mqtt(MqttSink(target=target(broker))), journal, clock=clock)
    journal.append(frame(1))
    wait_for(lambda: subscriber.numbers() == [1], what=sink.error)
    broker.kill()
    last = 1 + int(20 * OUTAGE_S)
    for number in range(2, last + 1):
        journal.append(frame(number))
        time.sleep(0.05)
    assert "Connection refused" in str(sink.error)
    broker.start()
    wait_for(lambda: len(subscriber.numbers()) == last, seconds=30.0, what=sink.error)
    assert subscriber.numbers() == list(range(1, last + 1))
    rising = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]
    tried = len(clock.waits_s)
    assert tried >= 3
    assert clock.waits_s[:9] == rising[:tried]
    assert sink.close(5.0) == 0
    journal.close()


def line_of(tmp_path: Path, broker: Broker) -> LineConfig:
    (tmp_path / "camera.py").write_text(CAMERA)
    camera = {"kind": "synthetic", "target": f"{tmp_path / 'camera.py'}:frame", "rate": 100.0}
    tables: dict[str, Any] = {
        "state": str(tmp_path / "state"), "source": camera,
        "policy": {"kind": "triggered", "queue": 64},
        "sink": [{"kind": "mqtt", "target": target(broker)}],
    }  # fmt: skip
    return line_config(tables, name="test")


def numbers_of(tmp_path: Path) -> list[int]:
    """Of the parts in the journal, in its order."""
    import json

    journal = Journal(tmp_path / "state" / "journal.sqlite")
    entries = journal.after(0, limit=1_000_000)
    journal.close()
    return [json.loads(entry.body)["number"] for entry in entries if entry.kind == "frame"]


def texts(subscriber: Subscriber) -> list[str]:
    return [e["record"]["text"] for e in subscriber.entries if e["record"].get("kind") == "sink"]


def test_a_line_goes_on_without_its_broker_and_tells_it_everything_afterwards(
    broker: Broker, subscriber: Subscriber, tmp_path: Path
) -> None:
    line = Line(make_bundle(tmp_path / "bundle"), line_of(tmp_path, broker))
    line.start()
    running = threading.Thread(target=line.run)
    running.start()
    try:
        wait_for(lambda: len(subscriber.numbers()) > 30, seconds=30.0, what=line.status())
        broker.kill()
        before = line.status().frames
        wait_for(lambda: line.status().frames > before + 150, what=line.status())
        assert "Connection refused" in str(line.status().sinks)
        broker.start()
        known = len(subscriber.numbers())
        wait_for(lambda: len(subscriber.numbers()) > known + 150, what=line.status())
        wait_for(lambda: len(texts(subscriber)) == 2, what=texts(subscriber))
    finally:
        line.request_stop()
        running.join()
        left = line.close()
    assert left == {}
    decided = numbers_of(tmp_path)
    wait_for(lambda: len(subscriber.numbers()) == len(decided))
    assert subscriber.numbers() == decided
    assert sorted(decided) == list(range(1, len(decided) + 1))
    failed, recovered = texts(subscriber)
    assert failed.endswith("it is tried again")
    assert recovered.endswith("takes verdicts again")
    wait_for(lambda: subscriber.statuses[-1] == "offline")
    assert subscriber.statuses[:2] == ["held", "online"]


def test_what_a_line_could_not_tell_before_its_end_is_told_by_the_next_one(
    broker: Broker, subscriber: Subscriber, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    line = Line(bundle, line_of(tmp_path, broker))
    line.start()
    running = threading.Thread(target=line.run)
    running.start()
    try:
        wait_for(lambda: len(subscriber.numbers()) > 10, seconds=30.0, what=line.status())
        broker.kill()
        before = line.status().frames
        wait_for(lambda: line.status().frames > before + 50, what=line.status())
    finally:
        line.request_stop()
        running.join()
        left = line.close(timeout_s=0.5)
    assert next(iter(left.values())) > 50
    decided = numbers_of(tmp_path)
    broker.start()
    following = Line(bundle, line_of(tmp_path, broker))
    assert following.close(timeout_s=10.0) == {}
    wait_for(lambda: len(subscriber.numbers()) == len(decided))
    assert subscriber.numbers() == decided
