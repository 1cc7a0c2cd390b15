"""Our own tegrastats child, played by scripts that behave, stall, die and print garbage."""

import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers.base import opened
from lpvit_profilers.tegrastats_process import TegrastatsSource

LINE = "RAM 1/2MB CPU [1%@100] cpu@50.5C VDD_IN {0}mW/{0}mW VDD_SOC 1000mW/1000mW"
Fake = Callable[[str], str]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Make an executable from the body of a script; `line(mw)` prints, `starts` counts starts."""

    def make(body: str) -> str:
        path = tmp_path / "tegrastats"
        counter = tmp_path / "starts"
        path.write_text(
            f"#!{sys.executable}\nimport sys, time, pathlib\n"
            f"counter = pathlib.Path({str(counter)!r})\n"
            "starts = int(counter.read_text()) + 1 if counter.exists() else 1\n"
            "counter.write_text(str(starts))\n"
            f"def line(mw): print({LINE!r}.format(mw), flush=True)\n"
            f"{body}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def until(happens: Callable[[], bool]) -> None:
    for _ in range(500):
        if happens():
            return
        time.sleep(0.02)
    raise AssertionError("it never happened")


STEADY = "while True:\n    line(5000)\n    time.sleep(0.02)"


def test_lines_become_samples_and_the_first_is_thrown_away(fake: Fake) -> None:
    body = "line(0)\nwhile True:\n    line(5000)\n    time.sleep(0.02)"
    with opened(TegrastatsSource(fake(body))) as source:
        sample = source.sample()
        assert sample.rails_mw == {"VDD_IN": 5000.0, "VDD_SOC": 1000.0}
        assert (sample.total_mw, sample.quality) == (5000.0, "measured")
        assert (source.info.total_rule, source.info.scope) == ("VDD_IN", "module_input")
        assert source.conditions().temperature_c == 50.5


def test_the_interval_is_passed_on(fake: Fake, tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'args')!r}, 'w').write(' '.join(sys.argv[1:]))\n" + STEADY
    with opened(TegrastatsSource(fake(body), interval_ms=250)):
        assert (tmp_path / "args").read_text() == "--interval 250"


def test_garbage_between_lines_does_no_harm(fake: Fake) -> None:
    body = (
        "while True:\n    line(5000)\n    sys.stdout.buffer.write(b'\\xff\\x00 VDD_IN\\n'"
        " + b'x' * 40000 + b'\\n')\n    sys.stdout.flush()\n    time.sleep(0.02)"
    )
    with opened(TegrastatsSource(fake(body))) as source:
        assert source.sample().total_mw == 5000.0


def test_one_that_dies_is_started_again_once(fake: Fake, tmp_path: Path) -> None:
    body = "line(0)\nfor _ in range(3):\n    line(starts * 1000)\n    time.sleep(0.02)"
    with opened(TegrastatsSource(fake(body), interval_ms=100)) as source:
        assert source.sample().total_mw == 1000.0
        until(lambda: source.sample().total_mw == 2000.0)
        until(lambda: source.sample().total_mw is None)
        assert source.sample().reason == (
            f"{source.info.sensor} ended; it was restarted once; run it by hand to see why"
        )
    assert (tmp_path / "starts").read_text() == "2"


def test_one_that_stalls_is_started_again(fake: Fake, tmp_path: Path) -> None:
    body = "line(0)\nline(1000)\nif starts == 1:\n    time.sleep(600)\n" + STEADY
    with opened(TegrastatsSource(fake(body), interval_ms=100)) as source:
        until(lambda: source.sample().total_mw == 5000.0)
    assert (tmp_path / "starts").read_text() == "2"


def test_one_without_rails_is_refused_in_words(fake: Fake) -> None:
    source = TegrastatsSource(fake("while True:\n    print('x')\n    time.sleep(1)"), start_s=0.3)
    with pytest.raises(EnvironmentUnfitError, match="printed no power rails"):
        source.open()
    assert source.child_pid is None


def test_rails_without_a_known_total_are_refused(fake: Fake) -> None:
    body = "while True:\n    print('VDD_X 1mW/1mW', flush=True)\n    time.sleep(0.02)"
    with pytest.raises(EnvironmentUnfitError, match="VDD_X, which hold no total"):
        TegrastatsSource(fake(body)).open()


def test_an_absent_executable_is_refused_in_words() -> None:
    with pytest.raises(EnvironmentUnfitError, match="it belongs to Jetson Linux"):
        TegrastatsSource("no-such-tegrastats").open()


def test_closing_ends_only_our_own_child(fake: Fake) -> None:
    executable = fake(STEADY)
    other, ours = TegrastatsSource(executable), TegrastatsSource(executable)
    with opened(other):
        with opened(ours):
            pid = ours.child_pid
            assert pid is not None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert other.sample().total_mw == 5000.0


def test_a_child_that_ignores_the_request_to_end_is_killed(fake: Fake) -> None:
    body = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STEADY
    with opened(TegrastatsSource(fake(body))) as source:
        pid = source.child_pid
        assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_intervals_nobody_has_seen_work_are_refused() -> None:
    with pytest.raises(ValueError, match="interval_ms is 10"):
        TegrastatsSource(interval_ms=10)
