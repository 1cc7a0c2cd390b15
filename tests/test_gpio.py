"""The reject line: pulses at exact times of a clock that jumps, on a line that is a stand-in.

There is no GPIO chip here. The settings are gpiod's own; only the request is not the kernel's.
"""

import errno
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

pytest.importorskip("gpiod", reason="extra gpio is not installed")
import gpiod
from gpiod.line import Drive, Value

from lpvit_edge.errors import SinkError
from lpvit_edge.line.config import parse_sink
from lpvit_edge.line.records import FrameRecord
from lpvit_edge.line.sink_config import GpioSink
from lpvit_edge.line.sinks.gpio import GpioReject
from lpvit_edge.line.sinks.pulses import PulseTrain
from tests.broker import wait_for
from tests.plant import frame

MS = 1_000_000
CONFIG = GpioSink(
    target="/dev/gpiochip0", line=17, delay_ms=120.0, pulse_ms=50.0, tolerance_ms=10.0
)


class JumpingClock:
    """Time jumps to the end of each wait, once it was let go."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.runs = threading.Event()

    def monotonic_ns(self) -> int:
        return self.now_ns

    def unix_s(self) -> float:
        return self.now_ns / 1e9

    def wait(self, event: threading.Event, seconds: float) -> bool:
        if seconds < 1.0 and self.runs.wait(10.0) and not event.is_set():
            self.now_ns += round(seconds * 1e9)
            return False
        return event.wait(min(seconds, 0.02))


class Chip:
    """Takes the requests for one line, and notes when it changes to which level."""

    def __init__(self, clock: JumpingClock) -> None:
        self._clock = clock
        self.settings: Any = None
        self.consumer = ""
        self.changes: list[tuple[float, bool]] = []
        self.is_requested = False
        self.fault: int | None = None

    def request_lines(self, path: str, consumer: str, config: dict[Any, Any]) -> "Chip":
        self._fail()
        assert (path, list(config)) == ("/dev/gpiochip0", [17])
        self.settings, self.consumer, self.is_requested = config[17], consumer, True
        self._note(self.settings.output_value)
        return self

    def set_value(self, line: int, value: Value) -> None:
        self._fail()
        assert (line, self.is_requested) == (17, True)
        self._note(value)

    def release(self) -> None:
        self.is_requested = False

    def _note(self, value: Value) -> None:
        self.changes.append((self._clock.now_ns / MS, value is Value.ACTIVE))

    def _fail(self) -> None:
        if self.fault is not None:
            raise OSError(self.fault, os.strerror(self.fault))


@pytest.fixture
def clock() -> JumpingClock:
    return JumpingClock()


@pytest.fixture
def chip(clock: JumpingClock, monkeypatch: pytest.MonkeyPatch) -> Chip:
    chip = Chip(clock)
    monkeypatch.setattr(gpiod, "request_lines", chip.request_lines)
    return chip


@pytest.fixture
def closing() -> Iterator[list[GpioReject]]:
    sinks: list[GpioReject] = []
    yield sinks
    for sink in sinks:
        sink.close(0.1)


def part(number: int, at_ms: float, verdict: str = "reject", **fields: Any) -> FrameRecord:
    plain = frame(number, "reject" if verdict == "reject" else "ok")
    return msgspec.structs.replace(plain, captured_ns=round(at_ms * MS), **fields)


def test_a_reject_is_a_pulse_of_the_right_length_after_the_delay_from_its_trigger(
    clock: JumpingClock, chip: Chip
) -> None:
    sink = GpioReject(CONFIG, clock)
    clock.now_ns = 40 * MS  # the verdicts took their time
    sink.deliver(part(1, 10.0), None)
    sink.deliver(part(2, 15.0, "ok"), None)
    sink.deliver(part(3, 30.0), None)
    clock.runs.set()
    assert sink.close(10.0) == 0
    # 130 and 150: the second begins while the first runs, and the two become one.
    assert chip.changes == [(0.0, False), (130.0, True), (200.0, False)]
    assert (sink.missed, sink.error, chip.is_requested) == (0, None, False)


def test_a_verdict_that_comes_too_late_for_its_pulse_gives_none_and_is_counted(
    clock: JumpingClock, chip: Chip
) -> None:
    sink = GpioReject(CONFIG, clock)
    clock.now_ns = 500 * MS
    sink.deliver(part(1, 500.0 - 131.0), None)  # its place was passed 11 ms ago
    sink.deliver(part(2, 500.0 - 129.0), None)  # 9 ms ago
    sink.deliver(part(3, 490.0, untimed=True), None)
    clock.runs.set()
    wait_for(lambda: sink.missed == 2, what=sink.missed)
    assert sink.close(10.0) == 0
    assert chip.changes == [(0.0, False), (500.0, True), (550.0, False)]


def test_the_line_stands_at_the_safe_level_until_the_line_judges_while_held_and_at_the_end(
    clock: JumpingClock, chip: Chip
) -> None:
    sink = GpioReject(msgspec.structs.replace(CONFIG, safe="active"), clock)
    clock.runs.set()
    for is_held, level in ((False, False), (True, True), (False, False)):
        sink.hold(is_held)
        wait_for(lambda level=level: chip.changes[-1][1] is level)  # type: ignore[misc]
    assert sink.close(10.0) == 0
    assert [level for _, level in chip.changes] == [True, False, True, False, True]
    assert not chip.is_requested


def test_pulses_that_are_not_due_in_time_are_given_up_at_the_end_and_told(chip: Chip) -> None:
    sink = GpioReject(msgspec.structs.replace(CONFIG, delay_ms=60_000.0))
    sink.deliver(frame(1, "reject"), None)
    assert sink.close(0.1) == 1
    assert [level for _, level in chip.changes] == [False]
    assert not chip.is_requested


def test_a_line_that_fails_is_told_counted_and_requested_anew_at_its_level(
    clock: JumpingClock, chip: Chip, closing: list[GpioReject]
) -> None:
    sink = GpioReject(CONFIG, clock)
    closing.append(sink)
    clock.runs.set()
    chip.fault = errno.EIO
    sink.deliver(part(1, 0.0), None)
    wait_for(lambda: sink.error is not None)
    assert sink.error == "gpio /dev/gpiochip0 line 17: Input/output error"
    assert not chip.is_requested
    sink.deliver(part(2, 200.0), None)
    assert sink.missed == 2
    chip.fault = None
    wait_for(lambda: sink.error is None)
    assert chip.changes[-1][1] is False
    clock.now_ns += 1000 * MS
    sink.deliver(part(3, clock.now_ns / MS - 100.0), None)
    wait_for(lambda: chip.changes[-2][1] is True, what=chip.changes)
    assert sink.missed == 2


def test_polarity_and_drive_are_the_kernels_business(
    clock: JumpingClock, chip: Chip, closing: list[GpioReject]
) -> None:
    settings = msgspec.structs.replace(CONFIG, active_low=True, drive="open drain")
    closing.append(GpioReject(settings, clock))
    assert chip.settings.active_low
    assert chip.settings.drive is Drive.OPEN_DRAIN
    assert chip.settings.output_value is Value.INACTIVE
    assert chip.consumer == "lpvit-edge"


@pytest.mark.parametrize(
    ("fault", "text"),
    [(errno.EBUSY, "gpioinfo says which"), (errno.EACCES, "add it to the group")],
)
def test_a_line_that_cannot_be_had_stops_the_start_in_words(
    clock: JumpingClock, chip: Chip, fault: int, text: str
) -> None:
    chip.fault = fault
    with pytest.raises(SinkError, match=f"gpio /dev/gpiochip0 line 17: .*{text}"):
        GpioReject(CONFIG, clock)


def test_a_chip_that_is_not_there_is_told_by_the_real_library() -> None:
    with pytest.raises(SinkError, match="No such file or directory; gpiodetect lists the chips"):
        GpioReject(msgspec.structs.replace(CONFIG, target="/dev/gpiochip4711"))


def test_with_the_clock_of_the_machine_no_pulse_begins_early(
    chip: Chip, clock: JumpingClock
) -> None:
    begun: list[float] = []
    settings = msgspec.structs.replace(CONFIG, delay_ms=60.0, pulse_ms=5.0, tolerance_ms=2000.0)
    sink = GpioReject(settings)
    now_ns = time.monotonic_ns()
    noted = chip._note

    def note(value: Value) -> None:
        begun.append((time.monotonic_ns() - now_ns) / MS)
        noted(value)

    chip._note = note  # type: ignore[method-assign]
    sink.deliver(msgspec.structs.replace(frame(1, "reject"), captured_ns=now_ns), None)
    assert sink.close(10.0) == 0
    assert [level for _, level in chip.changes] == [False, True, False]
    assert begun[0] >= 60.0
    assert begun[1] - begun[0] >= 5.0


def test_pulses_that_overlap_become_one_and_each_has_its_whole_length() -> None:
    train = PulseTrain(pulse_ns=50, tolerance_ns=10)
    for due_ns in (100, 300, 130):
        train.add(due_ns)
    assert (train.next_ns(), train.is_active(99)) == (100, False)
    assert train.is_active(105)  # five late, and it still lasts fifty
    assert train.next_ns() == 130
    assert train.is_active(130)
    assert (train.next_ns(), train.is_active(179), train.is_active(180)) == (180, True, False)
    assert not train.is_active(311)
    assert (train.begun, train.missed, train.next_ns()) == (2, 1, None)


def test_the_command_line_takes_a_chip_and_a_line() -> None:
    table = parse_sink("gpio:/dev/gpiochip0?line=17&delay_ms=120&active_low=true")
    assert (table["target"], table["delay_ms"], table["active_low"]) == (
        "/dev/gpiochip0",
        120.0,
        True,
    )
    assert str(table["line"]) == "17"
