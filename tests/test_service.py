"""A line as a service: what the service manager and the load balancer are told, and when."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.line.config import line_config, read_config
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.judge import lost_frame
from lpvit_edge.line.line import Line
from lpvit_edge.line.redact import from_environment
from lpvit_edge.line.sequence import SequenceFile
from tests.line_bundle import make_bundle, write_image
from tests.plant import TurnedClock
from tests.test_line import CAMERA, ROOT, folder_config, frames_of, run_until

UNIT = ROOT / "examples" / "systemd" / "lpvit-line.service"
EXAMPLES = sorted(ROOT.glob("examples/systemd/*.toml")) + sorted(ROOT.glob("examples/sinks/*.toml"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "a" / "bundle")


class Manager:
    """The service manager's end of $NOTIFY_SOCKET: a real datagram socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))

    def next(self, *, seconds: float) -> dict[str, str] | None:
        """The next message, None where none comes in time."""
        self._socket.settimeout(seconds)
        try:
            text = self._socket.recv(4096).decode()
        except TimeoutError:
            return None
        return dict(line.split("=", 1) for line in text.splitlines())

    def until(self, name: str, *, seconds: float = 20.0) -> dict[str, str]:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            message = self.next(seconds=max(end_s - time.monotonic(), 0.01))
            if message is not None and name in message:
                return message
        raise AssertionError(f"no {name} within {seconds} s")

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    found = Manager(tmp_path / "notify")
    yield found
    found.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(
    bundle: Bundle, tmp_path: Path, source: str, *, manager: Manager, health: int, policy: str
) -> "Iterator[subprocess.Popen[str]]":
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    environment = {
        "PYTHONPATH": path,
        "NOTIFY_SOCKET": str(manager.path),
        "WATCHDOG_USEC": "800000",
    }
    process = subprocess.Popen(
        [
            sys.executable, "-m", "lpvit_edge", "run", str(bundle.folder), "--source", source,
            "--policy", policy, "--state", str(tmp_path / "state"),
            "--health", f"127.0.0.1:{health}", "--json",
        ],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def asked(port: int, path: str, *, seconds: float = 20.0) -> tuple[int, dict[str, object]]:
    """Status code and document, once somebody listens."""
    end_s = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())
        except OSError:
            assert time.monotonic() < end_s
            time.sleep(0.02)


def asked_until(port: int, path: str, code: int, *, seconds: float = 20.0) -> dict[str, object]:
    end_s = time.monotonic() + seconds
    while True:
        found, document = asked(port, path)
        if found == code:
            return document
        assert time.monotonic() < end_s, document
        time.sleep(0.05)


def test_ready_comes_with_the_first_verdict_and_the_watchdog_goes_on_without_the_source(
    bundle: Bundle, tmp_path: Path, manager: Manager
) -> None:
    (tmp_path / "in").mkdir()
    port = free_port()
    source = f"folder:{tmp_path / 'in'}"
    with served(bundle, tmp_path, source, manager=manager, health=port, policy="wait") as process:
        # The engine answers its golden frames, the source is live, and no part has come.
        document = asked_until(port, "/readyz", 200)
        assert (document["engine"], document["source"], document["frames"]) == (True, True, 0)
        assert asked(port, "/healthz")[0] == 200
        assert manager.next(seconds=1.0) is None
        write_image(tmp_path / "in" / "a.png", 1)
        assert manager.until("READY")["READY"] == "1"
        assert manager.until("WATCHDOG")["STATUS"].startswith("1 frames")
        (tmp_path / "in").rename(tmp_path / "gone")
        document = asked_until(port, "/readyz", 503)
        assert document["source"] is False
        assert asked(port, "/healthz")[0] == 200  # a restart would not bring the folder back
        while "source lost" not in manager.until("WATCHDOG")["STATUS"]:
            pass  # what was sent before the folder went
        for _ in range(3):
            assert "source lost" in manager.until("WATCHDOG", seconds=1.0)["STATUS"]
        (tmp_path / "gone").rename(tmp_path / "in")
        asked_until(port, "/readyz", 200)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert json.loads(out)["ok"] == 1


def test_a_camera_that_gives_nothing_but_damaged_frames_is_no_engine_that_hangs(
    bundle: Bundle, tmp_path: Path
) -> None:
    """A restart by the watchdog would not mend its cable."""
    clock = TurnedClock()
    line = Line(bundle, folder_config(tmp_path), clock=clock)
    line.start()
    run_until(line, lambda: line.judge.passed_ns is not None)
    for number in range(1, 11):
        clock.turn(1.1)
        line.intake.accept(lost_frame(number, clock=clock, why="corrupt frame"))
        line.step()
        assert line.engine_answers()
    verdicts = {one["verdict"] for one in frames_of(line)}
    line.close()
    assert verdicts == {"safe"}


def test_sigterm_drains_what_was_taken_and_stops_with_every_part_judged(
    bundle: Bundle, tmp_path: Path, manager: Manager
) -> None:
    (tmp_path / "camera.py").write_text(CAMERA)
    source = f"synthetic:{tmp_path / 'camera.py'}:frame@200"
    port = free_port()
    with served(
        bundle, tmp_path, source, manager=manager, health=port, policy="triggered"
    ) as process:
        manager.until("READY")
        assert asked_until(port, "/readyz", 200)["engine"] is True
        process.send_signal(signal.SIGTERM)
        assert manager.until("STOPPING")["STOPPING"] == "1"
        out, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    summary = json.loads(out)
    with SequenceFile(tmp_path / "state" / "sequence") as sequence:
        taken = sequence.taken
    journal = Journal(tmp_path / "state" / "journal.sqlite")
    missing = journal.missing(0, taken)
    journal.close()
    assert missing == ()
    assert summary["frames"] == taken > 0


def test_an_unknown_page_is_404(bundle: Bundle, tmp_path: Path, manager: Manager) -> None:
    (tmp_path / "in").mkdir()
    port = free_port()
    source = f"folder:{tmp_path / 'in'}"
    with served(bundle, tmp_path, source, manager=manager, health=port, policy="wait"):
        asked_until(port, "/healthz", 200)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
        caught.value.close()
    assert caught.value.code == 404


def test_the_unit_waits_for_ready_and_restarts_what_the_watchdog_misses() -> None:
    lines = [line.partition("=") for line in UNIT.read_text(encoding="utf-8").splitlines()]
    settings = {name: value for name, _, value in lines}
    assert settings["Type"] == "notify"
    assert settings["Restart"] == "always"
    assert float(settings["WatchdogSec"]) >= 4.0  # the line sends four times in that time
    assert "lpvit run --store" in settings["ExecStart"]
    assert settings["StartLimitIntervalSec"] == "0"  # no number of failed starts is the last
    assert settings["EnvironmentFile"] == "-/etc/lpvit/line.env"


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("no systemd-analyze here; apt-get install systemd")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/lpvit/bin/lpvit", sys.executable)
    for change, words in (("", ""), ("Restrat=always\n", "Restrat")):
        unit = tmp_path / UNIT.name
        unit.write_text(text.replace("Restart=always\n", f"{change}Restart=always\n"))
        done = subprocess.run([systemd, "verify", str(unit)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert words in done.stderr if words else done.stderr == ""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_no_example_takes_each_frame_of_a_stream_for_a_part(path: Path) -> None:
    settings = line_config(read_config(path), name=path.name)
    is_stream = settings.source.__struct_config__.tag in ("rtsp", "v4l2")
    assert settings.policy.kind == ("newest" if is_stream else "triggered")


@pytest.mark.parametrize(
    ("name", "secret_part"),
    [("line.toml", "the-mqtt_password@10.0.0.7"), ("live.toml", "the-camera_password@10.0.0.5")],
)
def test_the_service_s_configurations_take_their_secrets_from_its_environment(
    name: str, secret_part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = UNIT.with_name(name)
    settings = line_config(read_config(path), name=name)
    for secret in re.findall(r"\$\{(\w+)\}", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(secret, f"the-{secret.lower()}")
    targets = [settings.source.target, *(sink.target for sink in settings.sink)]
    resolved = "\n".join(from_environment(target) for target in targets)
    assert "${" not in resolved
    assert secret_part in resolved
