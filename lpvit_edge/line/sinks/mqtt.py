"""Verdicts and events to an MQTT broker, at least once and in order.

TOPIC/verdict   one message a part: {"entry": 17, "kind": "frame", "record": {...}}
TOPIC/event     what happened to the line, likewise
TOPIC/status    retained: online, held (no part can be judged), offline; the last will is offline
"""

import ssl
import threading
import time
from collections.abc import Sequence
from typing import Any

from lpvit_edge.deps import require
from lpvit_edge.errors import SinkError, UnknownOptionError
from lpvit_edge.line.address import parse_address
from lpvit_edge.line.journal import Entry, as_json
from lpvit_edge.line.redact import redacted
from lpvit_edge.line.sink_config import MqttSink

_TOPICS = {"frame": "verdict", "event": "event"}
_KEEPALIVE_S = 10  # the broker publishes the last will after one and a half of these
_POLL_S = 0.02


class Mqtt:
    """A client with QoS 1 whose messages stay in the journal until the broker has taken them."""

    batch = 100
    longest_wait_s = 15.0
    missed = 0

    def __init__(self, config: MqttSink) -> None:
        """Take the address apart. Raises UnknownOptionError, MissingDependencyError."""
        self.name = f"mqtt {redacted(config.target)}"
        self._config = config
        self._address = parse_address(config.target, {"mqtt": 1883, "mqtts": 8883}, option="mqtt")
        self._topic = self._address.path
        if not self._topic or set(self._topic) & {"+", "#"}:
            raise UnknownOptionError(
                f"{self.name}: write a topic without + and # behind the host: mqtt://host/line3"
            )
        self._mqtt = require("paho.mqtt.client")
        self._client: Any = None
        self._answer: Any = None  # of the broker to the connection
        self._answered = threading.Event()
        self._status: str | None = None  # as the broker knows it

    def resume(self, delivered: int, newest: int) -> int:
        """Only the journal knows."""
        return delivered

    def too_old(self, entries: Sequence[Entry]) -> int:
        """Nothing is ever too old."""
        return 0

    def send(self, entries: Sequence[Entry]) -> None:
        """Publish the entries; returns when the broker has acknowledged each."""
        client = self._connected()
        self._settle(
            [
                client.publish(f"{self._topic}/{_TOPICS[entry.kind]}", as_json(entry), qos=1)
                for entry in entries
            ]
        )

    def beat(self, *, is_held: bool) -> None:
        """Keep the connection, and the status true."""
        client = self._connected()
        status = "held" if is_held else "online"
        if status != self._status:
            self._settle([self._publish_status(client, status)])
            self._status = status

    def disconnect(self) -> None:
        """Say that the line is offline, as far as the broker listens, and let go."""
        client, self._client, self._status = self._client, None, None
        if client is None:
            return
        if client.is_connected():
            # Ahead of the farewell in the same stream: the broker drops the last will with that.
            _wait(self._publish_status(client, "offline"), 1.0)
        client.disconnect()
        client.loop_stop()

    def _publish_status(self, client: Any, status: str) -> Any:
        return client.publish(f"{self._topic}/status", status, qos=1, retain=True)

    def _settle(self, messages: Sequence[Any]) -> None:
        """Wait until the broker has acknowledged the messages."""
        end_s = time.monotonic() + self._config.timeout_s
        for message in messages:
            while not _wait(message, _POLL_S):
                if not self._client.is_connected():
                    raise SinkError(f"{self.name}: the connection was lost")
                if time.monotonic() > end_s:
                    raise SinkError(f"{self.name}: the broker did not acknowledge in time")

    def _connected(self) -> Any:
        if self._client is None:
            self._connect()
        elif not self._client.is_connected():
            raise SinkError(f"{self.name}: the connection was lost")
        return self._client

    def _connect(self) -> None:
        self._client = client = self._new_client()
        self._answer = None
        self._answered.clear()
        try:
            client.connect(self._address.host, self._address.port, keepalive=_KEEPALIVE_S)
        except ssl.SSLCertVerificationError as error:
            raise SinkError(
                f"{self.name}: the broker's certificate is refused ({error.verify_message}); is "
                "it made for this host, and signed by an authority in ca = "
                f"{self._config.ca or '(those of this system)'}?"
            ) from error
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else None
            raise SinkError(f"{self.name}: {text or error}") from error
        client.loop_start()
        if not self._answered.wait(self._config.timeout_s):
            raise SinkError(f"{self.name}: the broker does not answer")
        if self._answer is None:
            hint = "; does it ask for a certificate of this client?" if self._is_bare else ""
            raise SinkError(f"{self.name}: the broker closed the connection{hint}")
        if self._answer.is_failure:
            raise SinkError(f"{self.name}: the broker refused: {self._answer}")

    def _new_client(self) -> Any:
        client = self._mqtt.Client(
            self._mqtt.CallbackAPIVersion.VERSION2,
            client_id=self._config.client_id or f"lpvit-{self._topic.replace('/', '-')}",
            reconnect_on_failure=False,  # the journal's reader connects anew, and knows from where
        )
        client.connect_timeout = self._config.timeout_s
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.will_set(f"{self._topic}/status", "offline", qos=1, retain=True)
        if self._address.user is not None:
            client.username_pw_set(self._address.user, self._address.password)
        if self._address.scheme == "mqtts":
            self._set_tls(client)
        return client

    def _set_tls(self, client: Any) -> None:
        config = self._config
        try:
            client.tls_set(config.ca, config.certificate, config.key)
        except (OSError, ValueError) as error:
            files = f"ca = {config.ca}, certificate = {config.certificate}, key = {config.key}"
            raise SinkError(
                f"{self.name}: the certificates cannot be used ({error}): {files}"
            ) from error

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, props: Any) -> None:
        self._answer = reason
        self._answered.set()

    def _on_disconnect(self, client: Any, *_: Any) -> None:
        if client is self._client:
            self._answered.set()

    @property
    def _is_bare(self) -> bool:
        """Encrypted, but without a certificate of our own."""
        return self._address.scheme == "mqtts" and self._config.certificate is None


def _wait(message: Any, timeout_s: float) -> bool:
    """Whether the broker has acknowledged a message, after waiting for it if need be."""
    try:
        message.wait_for_publish(timeout_s)
        return bool(message.is_published())
    except (RuntimeError, ValueError):  # paho's words for a connection that is down
        time.sleep(timeout_s)
        return False
