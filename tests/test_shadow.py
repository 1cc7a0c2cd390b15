"""The dense engine beside the line: it is compared, it may hang, and the line does not notice."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lpvit_edge.bundle import Bundle
from lpvit_edge.dashboard.hub import Hub
from lpvit_edge.dashboard.metrics import exposition
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.dashboard.snapshot import ShadowNow
from lpvit_edge.errors import FileFormatError
from lpvit_edge.line.config import line_config
from lpvit_edge.line.line import Line
from lpvit_edge.line.records import FrameRecord, StageLatency
from lpvit_edge.line.shadow import Shadow
from lpvit_edge.line.shadow_rule import ShadowRule
from lpvit_edge.line.verdict import VerdictRule
from tests.line_bundle import make_bundle, write_image
from tests.test_install import lpvit
from tests.test_line import folder_config, frames_of, run_until

HANGS = (sys.executable, "-c", "import time; time.sleep(600)")
DIES = (sys.executable, "-c", "raise SystemExit(3)")
IMAGE = np.full((6, 8, 3), 7, np.uint8)


@pytest.fixture
def dense(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "d" / "dense", network=b"dense")


def record(number: int, verdict: Any, label: str) -> FrameRecord:
    return FrameRecord(
        number=number, source="s", captured_at=0.0, captured_ns=0, verdict=verdict, label=label,
        action="pass", probabilities=(0.1, 0.1, 0.8), latency=StageLatency(total_ms=1.0),
    )  # fmt: skip


def shadow(dense: Bundle, *, told: list[str] | None = None, **options: Any) -> Shadow:
    rule = ShadowRule(share=options.pop("share", 1.0), timeout_s=options.pop("timeout_s", 20.0))
    said = [] if told is None else told
    return Shadow(
        dense, rule, VerdictRule(), event=lambda kind, text, _: said.append(f"{kind}: {text}"),
        **options,
    )  # fmt: skip


def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_what_the_dense_engine_s_library_prints_is_no_result_of_the_line(
    dense: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    prints = (sys.executable, "-c", "print('noise')")
    with shadow(dense, command=prints) as beside:
        beside.offer(record(1, "ok", "ok"), IMAGE)
        until(lambda: beside.now().failed == 1)
    out, errors = capfd.readouterr()
    assert "noise" not in out
    assert "noise" in errors


def test_escapes_and_overkills_are_counted_apart(dense: Bundle) -> None:
    """The dense engine says ok of every picture."""
    told: list[str] = []
    with shadow(dense, told=told) as beside:
        for number, (verdict, label) in enumerate(
            [("ok", "ok"), ("reject", "bad"), ("reject", "worse"), ("ok", "ok"), ("ok", "bad")]
        ):
            beside.offer(record(number, verdict, label), IMAGE)
            until(lambda count=number + 1: beside.now().compared == count)  # type: ignore[misc]
        now = beside.now()
    assert (now.agreed, now.overkills, now.other, now.escapes) == (2, 2, 1, 0), told
    assert (now.dropped, now.failed, now.reason) == (0, 0, None)


def test_what_the_line_passes_and_the_dense_engine_rejects_is_an_escape(tmp_path: Path) -> None:
    strict = make_bundle(tmp_path / "d" / "dense", network=b"dense")
    rule = VerdictRule(min_confidence=0.99)  # which the fake engine never reaches
    with Shadow(strict, ShadowRule(share=1.0), rule) as beside:
        beside.offer(record(1, "ok", "ok"), IMAGE)
        until(lambda: beside.now().compared == 1)
    assert beside.now().escapes == 1


def test_another_bundle_begins_with_no_agreement_and_no_dissent(dense: Bundle) -> None:
    with shadow(dense) as beside:
        beside.offer(record(1, "reject", "bad"), IMAGE)
        until(lambda: beside.now().overkills == 1)
        other = msgspec.structs.replace(record(2, "ok", "ok"), bundle="another")
        beside.offer(other, IMAGE)
        until(lambda: beside.now().compared == 1 and beside.now().agreed == 1)
    assert beside.now().overkills == 0


def test_only_the_share_is_compared_and_nothing_that_was_not_judged(dense: Bundle) -> None:
    beside = shadow(dense, share=0.1)  # not started: what it takes stays in its queue
    for number in range(1000):
        beside.offer(record(number, "ok", "ok"), IMAGE)
    taken = beside.now().dropped + beside._queue.qsize()
    assert 70 <= taken <= 130
    whole = shadow(dense)
    whole.offer(record(1, "ok", "ok"), None)
    whole.offer(FrameRecord(
        number=2, source="s", captured_at=0.0, captured_ns=0, verdict="safe", action="reject",
        latency=StageLatency(total_ms=1.0),
    ), IMAGE)  # fmt: skip
    assert whole._queue.qsize() == 0


def test_a_shadow_that_hangs_delays_no_verdict_and_its_frames_are_counted(
    dense: Bundle, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b" / "bundle")
    for number in range(60):
        write_image(tmp_path / f"{number:02d}.png", number)
    hanging = shadow(dense, timeout_s=300.0, command=HANGS)
    with hanging:
        line = Line(bundle, folder_config(tmp_path))
        line.outputs.shadow = hanging
        line.start()
        begin_s = time.monotonic()
        for number in range(60):
            (tmp_path / f"{number:02d}.png").rename(tmp_path / "in" / f"{number:02d}.png")
        run_until(line, lambda: line.summary().frames == 60)
        verdicts = [entry["verdict"] for entry in frames_of(line)]
        line.close()
        now = hanging.now()
    assert verdicts == ["ok"] * 60
    assert time.monotonic() - begin_s < 60.0  # 60 frames that waited would take 300 s each
    # One is with the process that hangs, four wait, and the line went on past all others.
    assert (now.compared, now.dropped) == (0, 55)


@pytest.mark.parametrize(("command", "said"), [(HANGS, "no answer within"), (DIES, "ended")])
def test_a_shadow_that_hangs_or_dies_is_started_again_and_said_once(
    dense: Bundle, command: tuple[str, ...], said: str
) -> None:
    told: list[str] = []

    def offered() -> bool:
        beside.offer(record(1, "ok", "ok"), IMAGE)
        return beside.now().failed >= 2

    with shadow(dense, told=told, timeout_s=0.2, command=command) as beside:
        until(offered)
    assert beside._process is None
    assert beside.now().dropped > 0
    (text,) = told
    assert said in text


def test_the_page_and_the_metrics_show_it(dense: Bundle) -> None:
    hub = Hub(device={}, power=PowerMonitor(None, reason="no sensor"))
    hub.shadow = lambda: ShadowNow(
        compared=9, agreed=6, escapes=2, overkills=1, other=0, dropped=4, failed=0
    )
    now = hub.now()
    assert now.shadow is not None
    text = exposition(now).decode()
    assert 'lpvit_shadow_frames_total{result="escapes"} 2.0' in text
    assert 'lpvit_shadow_frames_total{result="overkills"} 1.0' in text
    assert 'lpvit_shadow_frames_total{result="dropped"} 4.0' in text


def test_a_run_with_a_shadow_says_so_and_one_without_a_dense_bundle_is_refused(
    dense: Bundle, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "b" / "bundle")
    (tmp_path / "in").mkdir()
    write_image(tmp_path / "in" / "a.png", 3)
    done = lpvit(
        "run", bundle.folder, "--source", f"folder:{tmp_path / 'in'}", "--policy", "wait",
        "--state", tmp_path / "state", "--seconds", "1", "--shadow", dense.folder,
        "--shadow-share", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dense engine beside: " in done.stdout
    refused = lpvit(
        "run", bundle.folder, "--source", "folder:x", "--shadow", "dense",
        "--state", tmp_path / "state",
    )  # fmt: skip
    assert refused.returncode == 2
    assert "--shadow dense" in refused.stderr


def test_a_share_beyond_all_frames_is_refused() -> None:
    tables = {"source": {"kind": "folder", "target": "x"}, "shadow": {"share": 1.5}}
    with pytest.raises(FileFormatError, match=r"\$\.shadow\.share"):
        line_config(tables, name="line.toml")
