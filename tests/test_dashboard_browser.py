"""The page in a real browser: it draws, it moves, it says when a sensor is stale."""

import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from lpvit_edge.dashboard.fleet import Fleet
from lpvit_edge.dashboard.hub import Hub
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.dashboard.server import Dashboard, serve
from lpvit_edge.dashboard.snapshot import Snapshot
from tests.chromium import Chromium, chromium_or_skip
from tests.dashboard_line import ToldSource, frame, hub_of

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    chromium_or_skip()
    with Chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def source() -> ToldSource:
    return ToldSource()


@pytest.fixture
def page(source: ToldSource) -> Iterator[Dashboard]:
    stop = threading.Event()

    def line() -> None:
        number = 0
        while not stop.wait(0.05):
            hub.publish_frame(frame(number, total_ms=8.0 + number % 3), None, None)
            number += 1

    with hub_of(source) as hub, serve(hub, bind="127.0.0.1:0") as served:
        thread = threading.Thread(target=line)
        thread.start()
        yield served
        stop.set()
        thread.join()


def text(browser: Chromium, element: str) -> str:
    return str(browser.evaluate(f"document.getElementById('{element}').textContent"))


def pixels(browser: Chromium, chart: str) -> str:
    return str(browser.evaluate(f"document.querySelector('#{chart} canvas').toDataURL()"))


def test_the_page_draws_and_its_curves_move(
    browser: Chromium, page: Dashboard, source: ToldSource
) -> None:
    browser.messages.clear()
    browser.show(width=1280, height=900, dark=False)
    browser.open(page.url)
    browser.wait_for("document.getElementById('power')?.textContent === '8.00'")
    browser.wait_for("document.querySelector('#chart-power canvas') !== null")
    before = {name: pixels(browser, name) for name in ("chart-power", "chart-latency")}
    source.power_mw = 12_000.0
    browser.wait_for("document.getElementById('power').textContent === '12.0'")
    time.sleep(1.2)
    assert all(pixels(browser, name) != drawn for name, drawn in before.items())
    assert text(browser, "power-quality") == "measured"
    assert text(browser, "power-scope") == "module input"
    assert "no drift watch" in text(browser, "drift-text") or "no line" in text(
        browser, "drift-text"
    )
    assert browser.problems() == []
    assert all(url.startswith(page.url) for url in browser.requested())


def test_a_stale_sensor_shows_and_its_number_is_struck(
    browser: Chromium, page: Dashboard, source: ToldSource
) -> None:
    browser.open(page.url)
    browser.wait_for("document.getElementById('power')?.textContent === '8.00'")
    assert browser.evaluate("document.getElementById('banners').textContent") == ""
    source.silent = True
    browser.wait_for("document.getElementById('tile-power').classList.contains('stale')")
    banner = browser.wait_for("document.getElementById('banners').textContent")
    assert "Stale sensor: told has said nothing new for" in banner
    assert text(browser, "power-quality") == "stale"


def test_freezing_holds_the_view_and_only_the_view(browser: Chromium, page: Dashboard) -> None:
    browser.open(page.url)
    browser.wait_for("document.getElementById('frames')?.textContent.includes('since the start')")
    browser.evaluate("document.getElementById('freeze').click()")
    held = text(browser, "frames")
    time.sleep(2.2)
    assert text(browser, "frames") == held
    browser.evaluate("document.getElementById('freeze').click()")
    browser.wait_for(f"document.getElementById('frames').textContent !== {held!r}")


def test_curves_go_on_when_the_device_s_clock_is_set_back(
    browser: Chromium, source: ToldSource
) -> None:
    class Skewed:
        by_s = 0.0

        def now(self) -> Snapshot:
            now = hub.now()
            return msgspec.structs.replace(now, at=now.at + self.by_s)

    feed = Skewed()
    with hub_of(source) as hub, serve(feed, bind="127.0.0.1:0") as served:
        browser.show(width=1280, height=900, dark=False)
        browser.open(served.url)
        browser.wait_for("document.querySelector('#chart-power canvas') !== null")
        feed.by_s = -3600.0
        time.sleep(3.0)
        browser.wait_for("document.querySelector('#chart-power canvas') !== null")
        before = pixels(browser, "chart-power")
        source.power_mw = 12_000.0
        browser.wait_for("document.getElementById('power').textContent === '12.0'")
        time.sleep(1.2)
        assert pixels(browser, "chart-power") != before


def test_without_a_sensor_the_page_says_so_and_draws_no_zero(browser: Chromium) -> None:
    with hub_of(None) as hub, serve(hub, bind="127.0.0.1:0") as page:
        browser.open(page.url)
        browser.wait_for("document.getElementById('power')?.textContent === 'not measured'")
        assert text(browser, "power-quality") == "unavailable"
        browser.wait_for(
            "document.getElementById('chart-power').textContent.includes('no power sensor')"
        )
        assert browser.evaluate("document.querySelector('#chart-power canvas')") is None


def test_a_long_reason_can_be_read_whole_and_leaves_room_for_the_rest(browser: Chromium) -> None:
    reason = "no power sensor can be read here: " + "rapl: no RAPL domain; " * 18 + "the end"
    power = PowerMonitor(None, reason=reason)
    browser.show(width=1440, height=900, dark=False)
    with Hub(device={}, power=power) as hub, serve(hub, bind="127.0.0.1:0") as page:
        browser.open(page.url)
        browser.wait_for("document.getElementById('power')?.textContent === 'not measured'")
        assert text(browser, "power-note") == reason
        tall = browser.evaluate("document.getElementById('tile-power').offsetHeight")
        hidden = browser.evaluate(
            "(e => e.scrollHeight > e.clientHeight && getComputedStyle(e).overflowY)"
            "(document.getElementById('power-note'))"
        )
    assert tall < 260
    assert hidden == "auto"


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling_in_light_and_in_dark(
    browser: Chromium, page: Dashboard, dark: bool
) -> None:
    browser.show(width=390, height=844, dark=dark, phone=True)
    browser.open(page.url)
    browser.wait_for("document.querySelector('#chart-power canvas') !== null")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(14, 17, 22)" if dark else "rgb(244, 245, 247)")
    browser.show(width=1280, height=900, dark=False)


def test_a_token_opens_the_page_in_the_browser(browser: Chromium) -> None:
    with hub_of(ToldSource()) as hub, serve(hub, bind="0.0.0.0:0", token=TOKEN) as page:
        browser.open(f"http://127.0.0.1:{page.port}/")
        browser.wait_for("document.getElementById('token') !== null")
        browser.evaluate(
            f"document.getElementById('token').value = {TOKEN!r};"
            "document.querySelector('form').submit()"
        )
        browser.wait_for("document.getElementById('power')?.textContent === '8.00'")
        assert not browser.evaluate("document.getElementById('token') !== null")


def test_other_devices_stand_in_a_strip_and_one_that_is_missing_says_so(
    browser: Chromium, page: Dashboard
) -> None:
    fleet = Fleet([page.url, "http://127.0.0.1:9"])
    with hub_of(None) as hub, serve(hub, bind="127.0.0.1:0", fleet=fleet) as first:
        browser.messages.clear()
        browser.show(width=390, height=844, dark=True, phone=True)
        browser.open(first.url)
        browser.wait_for("document.getElementById('fleet')?.textContent.includes('8.00 W')")
        shown = browser.wait_for(
            "(t => t.includes('does not answer') && t)"
            "(document.getElementById('fleet').textContent)"
        )
        cards = browser.evaluate("document.querySelectorAll('#fleet .device').length")
        wide = browser.evaluate("document.documentElement.scrollWidth")
    browser.show(width=1280, height=900, dark=False)
    assert "Test board" in shown
    assert cards == 2
    assert wide <= 390
    assert browser.problems() == []
