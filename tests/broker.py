"""A real Mosquitto on a free port, with a password, that can be killed and started again."""

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

USER, PASSWORD = "line", "se/cr@et"
# What the broker has for a subscriber survives its kill, so that a loss is the publisher's fault.
_CONFIG = """
listener {port} 127.0.0.1
password_file {folder}/passwords
persistence true
persistence_location {folder}/
autosave_on_changes true
autosave_interval 1
max_inflight_messages 0
"""


def wait_for(done: Callable[[], bool], *, seconds: float = 15.0, what: object = "") -> None:
    end_s = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Broker:
    def __init__(self, folder: Path, more: str = "") -> None:
        binary = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
        if binary is None:
            pytest.skip("no mosquitto here: apt-get install mosquitto")
        self._binary = binary
        self.port = free_port()
        self._config = folder / "mosquitto.conf"
        self._config.write_text(_CONFIG.format(port=self.port, folder=folder) + more + _user())
        subprocess.run(
            ["mosquitto_passwd", "-b", "-c", str(folder / "passwords"), USER, PASSWORD], check=True
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._binary, "-c", str(self._config)], stderr=subprocess.DEVNULL
        )
        wait_for(self._listens, what="mosquitto does not listen")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def freeze(self) -> None:
        """It takes connections and bytes, and answers nothing, until it is killed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _user() -> str:
    import getpass

    return f"user {getpass.getuser()}\n"  # as root, mosquitto would become another user


class Subscriber:
    """Listens to line3/#, with a session that the broker keeps."""

    def __init__(self, port: int, *, tls: tuple[Path, Path, Path] | None = None) -> None:
        import paho.mqtt.client as mqtt
        from paho.mqtt.enums import CallbackAPIVersion

        self.entries: list[Any] = []
        self.statuses: list[str] = []
        self._subscribed = threading.Event()
        self._client: Any = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id="test", clean_session=False
        )
        self._client.username_pw_set(USER, PASSWORD)
        if tls is not None:
            self._client.tls_set(*(str(path) for path in tls))  # authority, certificate, key
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = lambda client, *_: client.subscribe("line3/#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = lambda _client, _data, message: self._take(message)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._subscribed.wait(10.0)

    def _take(self, message: Any) -> None:
        if message.topic == "line3/status":
            self.statuses.append(message.payload.decode())
        else:
            self.entries.append({"topic": message.topic, **json.loads(message.payload)})

    def numbers(self) -> list[int]:
        """Of the parts, in the order in which each was first told."""
        found = [e["record"]["number"] for e in self.entries if e["kind"] == "frame"]
        return list(dict.fromkeys(found))

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
