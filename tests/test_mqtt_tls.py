"""mqtts, against a real Mosquitto with certificates that an authority of our own has signed."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from lpvit_edge.errors import SinkError
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.sink_config import MqttSink
from lpvit_edge.line.sinks.mqtt import Mqtt
from lpvit_edge.line.sinks.remote import RemoteSink
from tests.broker import PASSWORD, USER, Broker, Subscriber, wait_for
from tests.certificates import Authority
from tests.plant import frame

# paho leaves the socket of a broker that it refuses to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed.*SSLSocket:ResourceWarning",
    "ignore:Exception ignored in.*SSLSocket:pytest.PytestUnraisableExceptionWarning",
)
pytest.importorskip("paho.mqtt.client", reason="extra mqtt is not installed")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def broker(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Broker]:
    """Its certificate is for 127.0.0.1, and it asks its clients for theirs."""
    folder = tmp_path / "mosquitto"
    folder.mkdir()
    monkeypatch.setenv("MQTT_PASSWORD", PASSWORD)
    certificate, key = authority.sign("broker", address="127.0.0.1")
    tls = f"cafile {authority.path}\ncertfile {certificate}\nkeyfile {key}\n"
    broker = Broker(folder, tls + "require_certificate true\n")
    yield broker
    broker.kill()


def config(
    broker: Broker, authority: Authority | None, client: tuple[Path, Path] | None,
    host: str = "127.0.0.1",
) -> MqttSink:  # fmt: skip
    certificate, key = client or (None, None)
    return MqttSink(
        target=f"mqtts://{USER}:${{MQTT_PASSWORD}}@{host}:{broker.port}/line3",
        ca=None if authority is None else str(authority.path),
        certificate=None if certificate is None else str(certificate),
        key=None if key is None else str(key),
        timeout_s=2.0,
    )


def test_verdicts_arrive_over_tls_with_certificates_on_both_sides(
    broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    client = authority.sign("line3")
    subscriber = Subscriber(broker.port, tls=(authority.path, *client))
    journal = Journal(tmp_path / "journal.sqlite")
    sink = RemoteSink(Mqtt(config(broker, authority, client)), journal)
    for number in range(1, 51):
        journal.append(frame(number))
    wait_for(lambda: len(subscriber.numbers()) == 50, what=sink.error)
    assert sink.close(5.0) == 0
    wait_for(lambda: subscriber.statuses[-1:] == ["offline"])
    subscriber.close()
    journal.close()


def refusal(settings: MqttSink) -> str:
    remote = Mqtt(settings)
    text = ""
    try:
        remote.beat(is_held=False)
    except SinkError as error:
        text = str(error)
    remote.disconnect()
    gc.collect()
    assert PASSWORD not in text
    return text


def test_a_broker_of_another_authority_is_refused_in_words(
    broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    client = authority.sign("line3")
    other = Authority(tmp_path, "other")
    for trusted in (other, None):  # None: the authorities of this system
        text = refusal(config(broker, trusted, client))
        assert "the broker's certificate is refused (" in text, text
        assert f"in ca = {trusted.path}" in text if trusted else "(those of this system)" in text


def test_a_broker_whose_certificate_is_for_another_host_is_refused_in_words(
    broker: Broker, authority: Authority
) -> None:
    text = refusal(config(broker, authority, authority.sign("line3"), host="localhost"))
    assert "certificate is not valid for 'localhost'" in text, text


def test_a_client_without_its_certificate_is_told_that_the_broker_let_go(
    broker: Broker, authority: Authority
) -> None:
    text = refusal(config(broker, authority, None))
    assert "closed the connection; does it ask for a certificate of this client?" in text, text


def test_certificates_that_are_not_there_are_named(
    broker: Broker, authority: Authority, tmp_path: Path
) -> None:
    certificate, _ = authority.sign("line3")
    text = refusal(config(broker, authority, (certificate, tmp_path / "nowhere.key")))
    assert "the certificates cannot be used" in text
    assert "nowhere.key" in text, text
