"""What the page says is so: of a line that waits, of energy in parts, of readings that are old."""

import threading
import time
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from lpvit_edge.bundle import Bundle
from lpvit_edge.dashboard import hub as hub_module
from lpvit_edge.dashboard.frame_energy import frame_energy
from lpvit_edge.dashboard.identity import CheckedEnergy, checked_energy
from lpvit_edge.dashboard.remote import RemoteFeed
from lpvit_edge.dashboard.server import serve
from lpvit_edge.line.config import line_config
from lpvit_edge.line.line import Line
from lpvit_edge.line.watched import watch_drift
from tests.dashboard_line import ToldSource, frame, hub_of
from tests.test_dashboard import ANY, ask, samples, until
from tests.test_install import run_folder

__all__ = ["run_folder"]
CHECKED = CheckedEnergy(gross_j=0.05, latency_s=0.005, scope="module_input")


def energy(**changed: Any) -> Any:
    usual = {"power_w": 9.0, "scope": "module_input", "per_s": 30.0, "idle_w": 4.0}
    return frame_energy(**{**usual, "checked": CHECKED, **changed})


def test_the_parts_of_a_frame_s_energy_add_up_and_count_no_idle_power_twice() -> None:
    found = energy()
    assert found.gross_j == pytest.approx(0.3)
    assert found.idle_j == pytest.approx(4.0 / 30)
    assert found.model_j == pytest.approx(
        0.05 - 4.0 * 0.005
    )  # an inference draws 10 W, 4 of them idle
    assert found.idle_j + found.model_j + found.capture_j == pytest.approx(found.gross_j)
    assert found.reason is None


@pytest.mark.parametrize(
    ("changed", "reason", "known"),
    [
        ({"per_s": 0.0}, "no frames", set()),
        ({"power_w": None}, "not measured here", set()),
        ({"idle_w": None}, "idle power is unknown", {"gross_j"}),
        ({"checked": CheckedEnergy(reason="no check")}, "no check", {"gross_j", "idle_j"}),
        ({"scope": "board_input"}, "measured module_input, here it is", {"gross_j", "idle_j"}),
        ({"power_w": 4.1}, "do not fit into", {"gross_j", "idle_j"}),
        ({"idle_w": 11.0, "power_w": 12.0}, "do not fit into", {"gross_j", "idle_j"}),
    ],
)
def test_a_part_that_is_not_known_is_left_out_with_the_reason(
    changed: dict[str, Any], reason: str, known: set[str]
) -> None:
    found = energy(**changed)
    assert reason in (found.reason or "")
    parts = ("gross_j", "idle_j", "model_j", "capture_j")
    assert {name for name in parts if getattr(found, name) is not None} == known


def test_idle_power_is_what_is_drawn_while_no_frame_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "_QUIET_S", 0.6)
    monkeypatch.setattr(hub_module, "_SETTLING_S", 0.2)
    source = ToldSource(9000.0)  # while the engine is loaded
    with hub_of(source, engine={"engine": "x"}, checked=CHECKED) as hub:
        until(lambda: hub.power.mean_w(seconds=10) is not None)
        hub.publish_frame(frame(0), None, None)
        assert "idle power is unknown" in (hub.now().energy.reason or "")
        source.power_mw = 4000.0
        hub.waits()
        time.sleep(1.0)
        hub.publish_frame(frame(1), None, None)
        now = hub.now()
    assert now.frames is not None
    assert now.energy.idle_j == pytest.approx(4.0 / now.frames.per_s, rel=0.2)


def test_large_pictures_that_wait_to_be_looked_at_are_bounded_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "_MOST_BYTES", 10_000)
    release, seen = threading.Event(), []

    class Slow:
        def see(self, record: Any, embedding: Any, image: Any) -> None:
            release.wait(10.0)
            seen.append(record.number)

        def drift_now(self, *, not_watched: int) -> Any:
            return None, str(not_watched)

        def shadow_now(self) -> Any:
            return None, None

        def close(self) -> None:
            """Nothing is open."""

    with hub_of(None, watcher=Slow()) as hub:
        for number in range(10):
            hub.publish_frame(frame(number), None, np.zeros((20, 50, 3), np.uint8))  # 3,000 bytes
        until(lambda: hub._queue.qsize() < 10)
        not_watched = int(hub.now().drift_reason or "")
        release.set()
        until(lambda: len(seen) == 10 - not_watched)
        assert 5 <= not_watched <= 7  # three wait, and one may be looked at
        hub.publish_frame(frame(10), None, np.zeros((100, 100, 3), np.uint8))  # larger than all
        until(lambda: seen[-1] == 10)


def test_a_watcher_that_does_not_come_back_does_not_keep_the_line_from_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_module, "_LAST_S", 0.05)
    release = threading.Event()

    class Hanging:
        def see(self, *_: Any) -> None:
            release.wait(30.0)

        def drift_now(self, *, not_watched: int) -> Any:
            return None, str(not_watched)

        def shadow_now(self) -> Any:
            return None, None

        def close(self) -> None:
            """Nothing is open."""

    with hub_of(None, watcher=Hanging()) as hub:
        for number in range(70):
            hub.publish_frame(frame(number), None, None)
        assert hub._queue.full()
    assert not release.is_set()  # it still hangs
    assert hub._thread.is_alive()
    release.set()
    hub._queue.put(None)
    hub._thread.join(10.0)


def test_a_check_of_another_model_is_not_this_engine_s(run_folder: Bundle) -> None:
    assert "of another model" in (checked_energy(run_folder).reason or "")


def test_a_line_that_waits_for_its_first_part_is_shown_as_one_that_runs(
    run_folder: Bundle,
    tmp_path: Any,
) -> None:
    source = {"kind": "folder", "target": str(tmp_path / "in")}
    (tmp_path / "in").mkdir()
    line = Line(run_folder, line_config({"state": str(tmp_path / "s"), "source": source}, name="t"))
    with hub_of(None) as hub:
        assert hub.now().frames is None
        bundles: Any = None  # nobody falls back
        watch_drift(hub, line, bundles)
        line.queue.dropped, line.feed.health.dropped = 2, 3
        now = hub.now()
    line.close()
    assert now.frames is not None
    assert (now.frames.total, now.frames.dropped, now.frames.age_s) == (0, 5, None)


def test_figures_of_a_device_that_went_away_are_not_told_as_the_present() -> None:
    with hub_of(ToldSource()) as hub:
        until(lambda: hub.now().power.total_w is not None)
        with serve(hub, bind=ANY) as page:
            feed = RemoteFeed(page.url)
            mirror = serve(feed, bind=ANY)
            mirror.__enter__()
            assert ask(mirror, "/metrics")[0] == 200
    try:
        until(lambda: ask(mirror, "/metrics")[0] == 503, seconds=8)
        assert "does not answer" in ask(mirror, "/api/now")[2]
    finally:
        mirror.__exit__(None, None, None)


def test_an_old_reading_leaves_the_metrics() -> None:
    with hub_of(ToldSource()) as hub, serve(hub, bind=ANY) as page:
        assert samples(ask(page, "/metrics")[2])["lpvit_power_available", ()] in (0.0, 1.0)
        page._stop.set()  # the ticker alone
        page._ticker.join()
        page._taken_s -= 10.0
        status, _, text = ask(page, "/metrics")
    assert status == 503
    assert "the last reading is 1" in text


def test_a_reading_that_fails_does_not_end_the_page() -> None:
    class Fails:
        broken = True

        def now(self) -> Any:
            if self.broken:
                raise KeyError("secret")
            return hub.now()

    feed = Fails()
    feed.broken = False
    with hub_of(ToldSource()) as hub, serve(feed, bind=ANY) as page:
        feed.broken = True
        until(lambda: ask(page, "/metrics")[0] == 503)
        text = ask(page, "/metrics")[2]
        assert "unexpected KeyError" in text
        assert "secret" not in text
        feed.broken = False
        until(lambda: ask(page, "/metrics")[0] == 200)
        assert msgspec.json.decode(ask(page, "/api/now")[2])["schema"] == "lpvit.now/1"
