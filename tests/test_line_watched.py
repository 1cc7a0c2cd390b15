"""A line that cannot keep up gives parts up in time, and one with a page is seen on it."""

import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.line.clock import SystemClock
from lpvit_edge.line.judge import Judge
from lpvit_edge.line.line import Line
from lpvit_edge.line.policy import FrameQueue, Policy
from lpvit_edge.line.watched import watched
from lpvit_engines.fake import FakeEngine
from tests.line_bundle import write_image
from tests.test_line import (  # noqa: F401  (fixtures)
    bundle,
    folder_config,
    frame,
    run_until,
)


class Slow(FakeEngine):
    calls = 0

    def infer_all(self, x: Any) -> Any:
        self.calls += 1
        time.sleep(0.02)
        return super().infer_all(x)


def test_a_part_that_would_be_late_is_given_up_without_the_engine(
    bundle: Bundle,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = folder_config(tmp_path)
    settings = msgspec.structs.replace(settings, policy=Policy(kind="wait", deadline_ms=5000.0))
    line = Line(bundle, settings)
    engine: Any = Slow(bundle.path("model.onnx"))
    queue = FrameQueue(Policy(kind="triggered"))
    judge = Judge(
        bundle,
        lambda: engine,
        queue,
        line.settlement,
        settings.verdict,
        source="test",
        clock=SystemClock(),
    )

    def pass_through(number: int, *, age_ms: float) -> None:
        part = frame(number)
        part = msgspec.structs.replace(part, captured_ns=part.captured_ns - int(age_ms * 1e6))
        line.settlement.expect(part)
        queue.put(part)
        judge.step(0.0)

    for number in (1, 2, 3):
        pass_through(number, age_ms=0.0)
    assert engine.calls == 3
    pass_through(4, age_ms=4990.0)  # 10 ms are left, a frame takes 20
    assert engine.calls == 3
    pass_through(5, age_ms=1000.0)  # the part behind it is judged in time
    assert engine.calls == 4
    counts = line.settlement.counts
    line.close()
    judge.close()
    assert (counts.ok, counts.safe, counts.late) == (4, 1, 1)


def test_a_line_with_a_page_shows_what_it_decided(
    bundle: Bundle,  # noqa: F811
    tmp_path: Path,
) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    settings = folder_config(tmp_path)
    for number in range(3):
        write_image(tmp_path / "in" / f"{number}.png", number)
    with watched(bundle, settings, bind="127.0.0.1:19377", token=None) as hub:
        line = Line(bundle, settings, hub=hub)
        line.start()
        run_until(line, lambda: line.summary().frames == 3)
        shown = ok_frames_on_the_page("http://127.0.0.1:19377/metrics")
        line.close()
    assert shown == 3.0


@pytest.mark.parametrize(("engine", "part"), [("openvino", "cpu"), ("tensorrt", "gpu")])
def test_the_page_shows_the_power_of_the_part_on_which_the_engine_works(
    engine: str,
    part: str,
    bundle: Bundle,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    asked: list[str | None] = []

    def monitor(*, working: str | None = None) -> PowerMonitor:
        asked.append(working)
        return PowerMonitor(None, reason="none in this test")

    monkeypatch.setattr("lpvit_edge.dashboard.power.monitor_of_this_device", monitor)
    manifest = msgspec.structs.replace(bundle.manifest, engine=engine)
    other = msgspec.structs.replace(bundle, manifest=manifest)
    with watched(other, folder_config(tmp_path), bind="127.0.0.1:19379", token=None):
        assert asked == [part]


def ok_frames_on_the_page(url: str) -> float | None:
    """Good parts counted in /metrics, which is taken anew every second."""
    end_s = time.monotonic() + 10.0
    while time.monotonic() < end_s:
        with urllib.request.urlopen(url, timeout=10) as answer:
            for text in answer.read().decode().splitlines():
                if text.startswith("lpvit_frames_total") and 'verdict="ok"' in text:
                    return float(text.rpartition(" ")[2])
        time.sleep(0.1)
    return None


def test_a_line_without_a_page_has_nobody_to_tell(
    bundle: Bundle,  # noqa: F811
    tmp_path: Path,
) -> None:
    with watched(bundle, folder_config(tmp_path), bind=None, token=None) as hub:
        assert hub is None
