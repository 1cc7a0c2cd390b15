"""The page's server without a browser: what it says, to whom, and what it never says."""

import http.client
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
parser = pytest.importorskip("prometheus_client.parser")

from lpvit_edge.dashboard.access import parse_bind, refuse_weak_token  # noqa: E402
from lpvit_edge.dashboard.fleet import Fleet, parse_device  # noqa: E402
from lpvit_edge.dashboard.history import MOST_SERIES, History  # noqa: E402
from lpvit_edge.dashboard.metrics import _power  # noqa: E402
from lpvit_edge.dashboard.remote import RemoteFeed, checked_url  # noqa: E402
from lpvit_edge.dashboard.server import Dashboard, serve  # noqa: E402
from lpvit_edge.dashboard.snapshot import Power, Snapshot  # noqa: E402
from lpvit_edge.errors import (  # noqa: E402
    DataError,
    EnvironmentUnfitError,
    UnknownOptionError,
)
from tests.dashboard_line import ToldSource, frame, hub_of  # noqa: E402

TOKEN = "a-token-of-the-tests-0123456789"
ANY = "127.0.0.1:0"


def ask(
    page: Dashboard, path: str, *, method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=body, headers=named)
        answer = connection.getresponse()
        lower = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, lower, answer.read().decode()
    finally:
        connection.close()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def until(condition: Any, *, seconds: float = 5.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.02)


@pytest.fixture
def source() -> ToldSource:
    return ToldSource()


@pytest.fixture
def page(source: ToldSource) -> Iterator[Dashboard]:
    with hub_of(source) as hub:
        until(lambda: hub.now().power.total_w is not None)
        for number in range(20):
            hub.publish_frame(frame(number, verdict="reject" if number == 3 else "ok"), None, None)
        hub.publish_event("source", "opened again", "warning", time.time())
        with serve(hub, bind=ANY) as served:
            yield served


def test_the_page_needs_nothing_from_elsewhere_and_forbids_it(page: Dashboard) -> None:
    status, headers, text = ask(page, "/")
    assert status == 200
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    for name in ("app.js", "charts.js", "tiles.js", "style.css", "uplot/uPlot.iife.min.js"):
        assert ask(page, f"/static/{name}")[0] == 200
    assert "MIT" in ask(page, "/static/uplot/LICENSE")[2]


def test_now_says_what_is_measured_and_why_the_rest_is_not(page: Dashboard) -> None:
    now = msgspec.json.decode(ask(page, "/api/now")[2], type=Snapshot)
    assert now.power.total_w == pytest.approx(8.0)
    assert now.power.rails_w == {"VDD_SOC": 1.5}  # VDD_IN is the total
    assert (now.power.scope, now.power.quality) == ("module_input", "measured")
    assert now.frames is not None
    assert (now.frames.total, now.frames.verdicts) == (20, {"ok": 19, "reject": 1})
    assert now.latency is not None
    assert (now.latency.p50_ms, now.latency.p999_ms) == (9.0, None)
    assert now.drift is None
    assert now.drift_reason
    assert now.energy.model_j is None
    assert now.energy.reason
    assert [event.text for event in now.events] == ["opened again"]


def test_metrics_have_base_units_and_count_no_watt_twice(page: Dashboard) -> None:
    status, headers, text = ask(page, "/metrics")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/plain")
    found = samples(text)
    watts = {
        labels: value for (name, labels), value in found.items() if name == "lpvit_power_watts"
    }
    by_scope: dict[str, float] = {}
    for labels, value in watts.items():
        scope = dict(labels)["scope"]
        by_scope[scope] = by_scope.get(scope, 0.0) + value
    assert by_scope == {"module_input": pytest.approx(8.0), "rail": pytest.approx(1.5)}
    names = {name for name, _ in found}
    assert {"lpvit_energy_joules_total", "lpvit_throttle_events_total"} <= names
    assert found["lpvit_trigger_to_verdict_seconds_bucket", (("le", "0.01"),)] == 20
    assert found["lpvit_trigger_to_verdict_seconds_bucket", (("le", "0.0075"),)] == 0
    assert found["lpvit_trigger_to_verdict_seconds_sum", ()] == pytest.approx(0.18)
    assert found["lpvit_frames_total", (("verdict", "reject"),)] == 1
    assert found["lpvit_clock_hertz", ()] == 1.5e9


def test_rails_are_no_better_than_their_sensor() -> None:
    for quality, of_rails in (("suspect", "suspect"), ("summed", "measured")):
        power = Power(
            quality=quality, reason=None, source="s", scope="board", total_w=3.0, rails_w={"a": 1.0}
        )
        (watts, *_) = _power(power)
        assert [s.labels["quality"] for s in watts.samples] == [quality, of_rails]


def test_without_a_sensor_there_is_a_reason_and_no_zero() -> None:
    with hub_of(None) as hub, serve(hub, bind=ANY) as page:
        now = msgspec.json.decode(ask(page, "/api/now")[2], type=Snapshot)
        assert (now.power.total_w, now.power.quality) == (None, "unavailable")
        assert now.power.reason == "no power sensor can be read here"
        text = ask(page, "/metrics")[2]
    assert "lpvit_power_watts{" not in text
    assert "lpvit_energy_joules_total" not in text
    assert samples(text)["lpvit_power_available", ()] == 0


def test_a_sensor_that_falls_silent_is_stale_and_its_watts_leave_the_metrics(
    source: ToldSource,
) -> None:
    with hub_of(source) as hub:
        until(lambda: hub.now().power.total_w is not None)
        assert not hub.now().power.stale
        source.silent = True
        until(lambda: hub.now().power.stale)
        power = hub.now().power
        assert power.reason == "the sensor gives nothing new"
        assert power.age_s is not None
        assert power.age_s > 1.4
        with serve(hub, bind=ANY) as page:
            text = ask(page, "/metrics")[2]
    assert "lpvit_power_watts{" not in text
    assert samples(text)["lpvit_power_available", ()] == 0


def test_a_gap_in_the_readings_is_not_counted_as_energy(source: ToldSource) -> None:
    with hub_of(source) as hub:
        until(lambda: (hub.now().power.energy_j or 0) > 1.0)
        source.power_mw = None
        time.sleep(1.0)
        before = hub.now().power
        source.power_mw = 8000.0
        until(lambda: hub.now().power.energy_gap_s > 0)
        after = hub.now().power
    assert after.energy_gap_s == pytest.approx(1.1, abs=0.5)
    assert before.energy_j is not None
    assert after.energy_j is not None
    assert after.energy_j - before.energy_j < 4.0  # 8 J went by in the gap


def test_other_names_are_refused_on_loopback(page: Dashboard) -> None:
    for host in ("evil.example", "evil.example:9310", ""):
        assert ask(page, "/api/now", Host=host)[0] == 421
    for host in ("localhost", f"127.0.0.1:{page.port}", "[::1]:9310"):
        assert ask(page, "/api/now", Host=host)[0] == 200


def test_beyond_loopback_a_token_is_needed_and_asked_for() -> None:
    with hub_of(None) as hub:
        with pytest.raises(UnknownOptionError, match="needs a token"):
            serve(hub, bind="0.0.0.0:0")
        with serve(hub, bind="0.0.0.0:0", token=TOKEN) as page:
            assert ask(page, "/")[:1] == (303,)
            for path in ("/api/now", "/metrics", "/api/stream", "/api/history"):
                assert ask(page, path)[0] == 401
            assert ask(page, "/api/now", Authorization="Bearer wrong")[0] == 401
            assert ask(page, "/metrics", Authorization=f"Bearer {TOKEN}")[0] == 200
            assert ask(page, "/login")[0] == 200
            form = {"Content_Type": "application/x-www-form-urlencoded"}
            assert ask(page, "/login", method="POST", body="token=no", **form)[0] == 403
            status, headers, _ = ask(page, "/login", method="POST", body=f"token={TOKEN}", **form)
            assert status == 303
            cookie = headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "samesite=strict" in cookie.lower()
            assert ask(page, "/", Cookie=cookie.partition(";")[0])[0] == 200
            assert TOKEN not in ask(page, "/", Cookie=cookie.partition(";")[0])[2]


def test_nothing_can_be_written(page: Dashboard) -> None:
    for path in ("/", "/api/now", "/api/history", "/metrics"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert ask(page, path, method=method)[0] == 405


@pytest.mark.parametrize("path", ["/static/../server.py", "/static/%2e%2e/server.py", "/api/x"])
def test_files_beside_the_static_ones_are_not_served(page: Dashboard, path: str) -> None:
    assert ask(page, path)[0] == 404


def test_the_stream_tells_a_second_later_more(page: Dashboard) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
    connection.request("GET", "/api/stream")
    answer = connection.getresponse()
    lines = [answer.readline() for _ in range(4)]
    connection.close()
    times = [msgspec.json.decode(line.removeprefix(b"data: "))["now"]["at"] for line in lines[::2]]
    assert 0.5 < times[1] - times[0] < 2.5


def test_a_port_in_use_is_said_in_words() -> None:
    message = r"cannot listen on 127\.0\.0\.1 port"
    with (
        hub_of(None) as hub,
        serve(hub, bind=ANY) as page,
        pytest.raises(EnvironmentUnfitError, match=message),
    ):
        serve(hub, bind=f"127.0.0.1:{page.port}")


@pytest.mark.parametrize("bind", ["", "9310", "host.example:80", "127.0.0.1:99999", "::1:80"])
def test_an_address_that_is_none_is_refused(bind: str) -> None:
    with pytest.raises(UnknownOptionError):
        parse_bind(bind)


@pytest.mark.parametrize("token", ["", "short", "with a blank in the middle of it", "ä" * 20])
def test_a_weak_token_is_refused(token: str) -> None:
    with pytest.raises(UnknownOptionError, match="make one with"):
        refuse_weak_token(token)


def test_history_keeps_means_and_gaps_in_bounded_memory() -> None:
    history = History()
    for second in range(100_000, 100_700):
        if not 100_300 <= second < 100_310:
            history.add(second, {"power": float(second % 2)})
    times, series = history.read("10m")
    assert len(times) == 600
    assert series["power"][times.index(100_305)] is None
    times, series = history.read("3h")
    assert series["power"][times.index(100_300)] is None
    assert series["power"][times.index(100_400)] == 0.5
    for number in range(2 * MOST_SERIES):
        history.add(100_700, {f"rail {number}": 1.0})
    assert len(history.read("24h")[1]) == MOST_SERIES


def test_a_clock_that_jumps_back_starts_a_new_history() -> None:
    history = History()
    history.add(5000, {"power": 1.0})
    history.add(1000, {"power": 2.0})
    assert history.read("10m") == ([1000], {"power": [2.0]})


def test_another_device_is_shown_and_one_that_lies_is_not(page: Dashboard) -> None:
    found = RemoteFeed(page.url).now()
    assert found.device["board"] == "Test board"
    with serve(RemoteFeed(page.url), bind=ANY) as mirror:
        assert "Test board" in ask(mirror, "/metrics")[2]
    feed = RemoteFeed(page.url)
    feed.url = page.url + "static/style.css?"
    with pytest.raises(DataError, match="sends something else"):
        feed.now()


def test_a_device_that_went_away_is_an_error_on_the_page(source: ToldSource) -> None:
    with hub_of(source) as hub:
        until(lambda: hub.now().power.total_w is not None)
        with serve(hub, bind=ANY) as page:
            feed = RemoteFeed(page.url)
            mirror = serve(feed, bind=ANY)
            mirror.__enter__()
    try:
        until(lambda: b"does not answer" in _first_message(mirror), seconds=8)
        assert b"does not answer" in _first_message(mirror)  # and it stays so
    finally:
        mirror.__exit__(None, None, None)


def _first_message(page: Dashboard) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=5)
    connection.request("GET", "/api/stream")
    line = connection.getresponse().readline()
    connection.close()
    return line


def test_the_fleet_strip_reads_metrics_and_says_who_is_missing(page: Dashboard) -> None:
    with Fleet([page.url, "http://127.0.0.1:9"]) as fleet:
        until(lambda: all(device.error != "not asked yet" for device in fleet.devices()))
        there, absent = fleet.devices()
    assert (there.name, there.power_w, there.scope) == ("Test board", 8.0, "module_input")
    assert there.frames == 20
    assert absent.error is not None
    assert "does not answer" in absent.error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "not in Prometheus' form|no metrics of lpvit"),
        (b"up 1\n", "no metrics of lpvit"),
        (b"\xff\xfe", "not in Prometheus' form"),
        (b'lpvit_drift_level NaN\nlpvit_power_watts{rail="total" 3\n', "Prometheus' form"),
    ],
)
def test_a_page_that_is_not_lpvit_s_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_device("http://x", content)


def test_a_level_that_is_no_number_is_no_level() -> None:
    assert parse_device("http://x", b"lpvit_drift_level NaN\n").drift_level is None


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "http://a:b@host", "ftp://x"])
def test_an_address_that_is_no_page_is_refused(url: str) -> None:
    with pytest.raises(UnknownOptionError):
        checked_url(url)


def test_the_verb_serves_a_recording_until_it_is_stopped(tmp_path: Path) -> None:
    import os
    import re
    import signal
    import subprocess
    import sys

    log = Path(__file__).parent / "fixtures/tegrastats/orinnano8_jp6_user.txt"
    command = [sys.executable, "-m", "lpvit_edge", "dashboard", "--bind", ANY]
    process = subprocess.Popen(
        [*command, "--replay", str(log), "--interval", "0.1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+/)\n", line)
        assert found, line + process.stderr.read()
        feed = RemoteFeed(found[1])
        until(lambda: feed.now().power.total_w is not None)
        assert feed.now().power.source == "replay of tegrastats"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()
