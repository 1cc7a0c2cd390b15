"""Verdicts over Modbus TCP, against a real server that goes away, comes back, freezes, refuses."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lpvit_edge.errors import SinkError, UnknownOptionError
from lpvit_edge.line.config import parse_sink
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.records import LineEvent
from lpvit_edge.line.sink_config import ModbusSink
from lpvit_edge.line.sinks.modbus import HELD, OFFLINE, ONLINE, SLOTS, Modbus
from lpvit_edge.line.sinks.remote import RemoteSink
from lpvit_edge.line.sinks.tally import Tally
from tests.broker import free_port, wait_for
from tests.controller import COIL, FIRST, Controller
from tests.plant import frame

ROOT = Path(__file__).parent.parent


@pytest.fixture
def controller() -> Iterator[Controller]:
    controller = Controller()
    yield controller
    controller.stop()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


def config(port: int, **settings: object) -> ModbusSink:
    plain = ModbusSink(
        target=f"modbus://127.0.0.1:{port}", register=FIRST, coil=COIL, timeout_s=0.5
    )
    return msgspec.structs.replace(plain, **settings)


def test_a_verdict_stands_in_its_slot_with_counters_and_coils(
    controller: Controller, journal: Journal
) -> None:
    sink = RemoteSink(Modbus(config(controller.port)), journal)
    controller.wait_for_state(ONLINE)
    journal.append(frame(70_001, "ok", age_s=0.05, probabilities=(0.1, 0.2, 0.7)))
    journal.append(LineEvent(kind="gap", text="two triggers missed", severity="alarm", at=1.0))
    journal.append(frame(70_002, "reject", probabilities=(0.9, 0.1, 0.0)))
    wait_for(lambda: controller.scan() == [70_001, 70_002], what=sink.error)
    good, bad = controller.verdicts
    age_ms = good.pop("age_ms")
    assert good == {"number": 70_001, "verdict": 1, "action": 1, "label": 3, "confidence": 7000}
    assert 50 <= age_ms < 550
    assert (bad["verdict"], bad["action"], bad["label"]) == (2, 2, 1)
    assert [controller.number(offset) for offset in (6, 8, 10, 12)] == [1, 1, 0, 0]
    assert controller.coils() == [True, True]
    assert sink.close(5.0) == 0


def test_the_state_says_held_and_at_the_end_stopped_and_no_coil_stays_set(
    controller: Controller, journal: Journal
) -> None:
    sink = RemoteSink(Modbus(config(controller.port)), journal)
    journal.append(frame(1, "reject"))
    wait_for(lambda: controller.coils() == [True, True], what=sink.error)
    sink.hold(True)
    controller.wait_for_state(HELD)
    assert controller.coils() == [False, False]
    assert sink.close(5.0) == 0
    assert controller.registers(3) == [OFFLINE]


@pytest.mark.parametrize("interruption", ["hold", "outage", "late part"])
def test_the_coil_rejects_a_part_once_whatever_comes_between(
    interruption: str, controller: Controller, journal: Journal
) -> None:
    sink = RemoteSink(Modbus(config(controller.port)), journal)
    journal.append(frame(1, "reject"))
    wait_for(lambda: controller.coils() == [True, True], what=sink.error)
    if interruption == "hold":
        sink.hold(True)
        controller.wait_for_state(HELD)
        sink.hold(False)
        controller.wait_for_state(ONLINE)
    elif interruption == "outage":
        controller.stop()
        wait_for(lambda: sink.error is not None)
        controller.start()
        wait_for(lambda: sink.error is None)
    else:
        journal.append(frame(2, "reject", age_s=60.0))
        wait_for(lambda: sink.missed == 1)
    wait_for(lambda: controller.coils()[1])
    end_s = time.monotonic() + 0.6  # two heartbeats
    seen = {tuple(controller.coils())}
    while time.monotonic() < end_s:
        time.sleep(0.01)
        seen.add(tuple(controller.coils()))
    if interruption == "late part":
        seen.discard((True, True))  # between `missed` and the writing
    assert seen == {(False, True)}
    assert controller.coils() == [False, True]
    journal.append(frame(3, "reject"))
    wait_for(lambda: controller.coils() == [True, True], what=sink.error)
    assert sink.close(5.0) == 0


def test_a_full_ring_of_verdicts_at_once_is_read_whole_and_in_order(
    controller: Controller, journal: Journal
) -> None:
    for start in (1, 101):
        sink = RemoteSink(Modbus(config(controller.port)), journal)
        controller.wait_for_state(ONLINE)
        for number in range(start, start + SLOTS):
            journal.append(frame(number))
        assert sink.close(5.0) == 0
        expected = list(range(start, start + SLOTS))
        assert controller.scan()[-SLOTS:] == expected
    assert controller.overwritten == 0


def test_a_controller_that_answers_once_in_its_cycle_misses_none_of_sixty_parts_a_second(
    controller: Controller, journal: Journal
) -> None:
    controller.cycle_s = 0.02
    settings = config(controller.port, coil=None, max_age_ms=1500.0)
    sink = RemoteSink(Modbus(settings), journal)
    controller.wait_for_state(ONLINE)
    for number in range(1, 91):
        journal.append(frame(number))
        time.sleep(1 / 60)
        controller.scan()
    wait_for(lambda: controller.scan() == list(range(1, 91)), what=controller.overwritten)
    assert sink.close(5.0) == 0
    assert (sink.missed, controller.overwritten) == (0, 0)


def test_what_was_decided_while_the_controller_was_off_is_counted_and_not_told(
    controller: Controller, journal: Journal
) -> None:
    sink = RemoteSink(Modbus(config(controller.port)), journal)
    journal.append(frame(1))
    wait_for(lambda: controller.scan() == [1], what=sink.error)
    controller.stop()
    wait_for(lambda: sink.error is not None)
    for number in range(2, 1002):
        journal.append(frame(number, "reject"))
    time.sleep(0.6)
    wait_for(lambda: sink.missed == 1000, what=sink.missed)  # while it is still off
    controller.start()
    wait_for(lambda: sink.error is None, what=sink.error)
    journal.append(frame(1002))
    wait_for(lambda: controller.scan() == [1, 1002], what=(controller.verdicts, sink.error))
    assert [controller.number(offset) for offset in (6, 8, 12)] == [2, 1000, 1000]
    assert sink.close(5.0) == 0


def test_a_long_outage_takes_no_memory_for_each_part(journal: Journal) -> None:
    tally = Tally(max_age_ms=500.0)
    for number in range(1, 1001):
        journal.append(frame(number, age_s=60.0))
    entries = journal.after(0, limit=1000)
    assert tally.too_old(entries) == 1000
    assert (tally.missed, tally.remembered) == (1000, 0)


def test_a_verdict_that_turns_old_while_the_controller_freezes_is_not_told(
    controller: Controller, journal: Journal
) -> None:
    sink = RemoteSink(Modbus(config(controller.port, max_age_ms=1000.0)), journal)
    controller.wait_for_state(ONLINE)
    controller.is_frozen = True
    journal.append(frame(1, "reject"))
    wait_for(lambda: sink.error is not None)
    assert sink.error is not None
    assert "no answer came within 0.5 s" in sink.error
    time.sleep(1.0)
    controller.is_frozen = False
    wait_for(lambda: sink.error is None and sink.missed == 1, what=(sink.error, sink.missed))
    journal.append(frame(2))
    wait_for(lambda: controller.scan() == [2], what=controller.verdicts)
    assert sink.close(5.0) == 0


@pytest.mark.parametrize(
    ("cycle_s", "shown"),
    [(1.2, False), (0.6, True)],
    ids=["before the coil", "between coil and ring"],
)
def test_a_verdict_that_turns_old_between_two_requests_is_not_made_known_by_the_next(
    controller: Controller, journal: Journal, cycle_s: float, shown: bool
) -> None:
    """The controller takes so long for each request; the verdict may be a second old."""
    remote = Modbus(config(controller.port, max_age_ms=1000.0, timeout_s=5.0))
    remote.beat(is_held=False)
    controller.cycle_s = cycle_s
    journal.append(frame(1, "reject"))
    remote.send(journal.after(0))
    controller.cycle_s = 0.0
    assert controller.coils() == [shown, True]
    assert controller.registers(5) == [0]
    assert remote.missed == 1
    journal.append(frame(2))
    remote.send(journal.after(1))
    assert controller.scan() == [2]
    assert controller.coils() == [False, True]
    remote.disconnect()


def test_what_turned_old_among_several_is_left_out_of_the_ring(
    controller: Controller, journal: Journal
) -> None:
    remote = Modbus(config(controller.port, coil=None, max_age_ms=2000.0, timeout_s=5.0))
    remote.beat(is_held=False)
    controller.cycle_s = 0.4
    journal.append(frame(1, "reject", age_s=1.7))
    journal.append(frame(2))
    remote.send(journal.after(0))
    assert controller.scan() == [2]
    assert remote.missed == 1
    remote.disconnect()


def test_the_coil_rejects_a_part_once_when_the_request_behind_it_fails(
    controller: Controller, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Modbus(config(controller.port, max_age_ms=60_000.0))
    remote.beat(is_held=False)
    journal.append(frame(1, "reject"))
    entries = journal.after(0)
    write = remote._write

    def lost(client: Any, offset: int, values: list[int]) -> None:
        if offset == 0:
            raise SinkError("the connection was lost")
        write(client, offset, values)

    with monkeypatch.context() as patched:
        patched.setattr(remote, "_write", lost)
        with pytest.raises(SinkError):
            remote.send(entries)
    assert controller.coils() == [True, True]
    remote.disconnect()
    remote.beat(is_held=False)
    assert controller.coils() == [False, True]
    remote.send(entries)
    assert controller.coils() == [False, True]
    assert controller.scan() == [1]  # the ring tells it still, by its number
    assert remote.missed == 1  # and an alarm, since nobody knows what the coil did
    remote.disconnect()


def test_the_heart_beats_with_each_verdict_that_is_written_slowly(
    controller: Controller, journal: Journal
) -> None:
    remote = Modbus(config(controller.port, max_age_ms=60_000.0))
    remote.beat(is_held=False)
    hearts = set()
    for number in range(1, 5):
        journal.append(frame(number))
        remote.send(journal.after(number - 1))
        hearts.add(controller.registers(2)[0])
    assert len(hearts) == 4
    remote.disconnect()


def test_a_part_whose_trigger_nobody_saw_is_not_told(
    controller: Controller, journal: Journal
) -> None:
    sink = RemoteSink(Modbus(config(controller.port)), journal)
    controller.wait_for_state(ONLINE)
    journal.append(frame(1, "safe", untimed=True))
    journal.append(frame(2, age_s=-3600.0))  # from before this machine was started anew
    journal.append(frame(3))
    wait_for(lambda: controller.scan() == [3], what=sink.error)
    assert sink.missed == 2
    assert sink.close(5.0) == 0


def test_what_an_earlier_run_left_is_not_told(controller: Controller, journal: Journal) -> None:
    journal.append(frame(1, "reject"))
    sink = RemoteSink(Modbus(config(controller.port)), journal)
    journal.append(frame(2))
    wait_for(lambda: controller.scan() == [2], what=sink.error)
    assert sink.close(5.0) == 0


_CHILD = """
import sys, time
from pathlib import Path
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.sinks.modbus import Modbus
from lpvit_edge.line.sinks.remote import RemoteSink
from tests.test_modbus import config
sink = RemoteSink(Modbus(config(int(sys.argv[2]))), Journal(Path(sys.argv[1])))
time.sleep(60.0)
"""


def test_the_heartbeat_stands_still_after_a_kill_of_the_line(
    controller: Controller, tmp_path: Path
) -> None:
    path = os.pathsep.join(str(ROOT / name) for name in (".", "engines", "profilers"))
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path / "journal.sqlite"), str(controller.port)],
        env=os.environ | {"PYTHONPATH": path},
    )
    try:
        wait_for(lambda: controller.registers(2)[0] >= 4, seconds=30.0)
    finally:
        child.kill()
        child.wait()
    time.sleep(0.1)
    heart = controller.registers(2)
    time.sleep(1.0)
    assert controller.registers(2) == heart
    assert controller.registers(3) == [ONLINE]  # only the heartbeat tells


def test_a_refused_write_is_told_in_words_and_tried_again(
    controller: Controller, journal: Journal
) -> None:
    controller.refuses = True
    sink = RemoteSink(Modbus(config(controller.port, coil=None)), journal)
    wait_for(lambda: sink.error is not None)
    assert sink.error == (
        f"modbus modbus://127.0.0.1:{controller.port}: the controller refused to write registers "
        "100 to 115, unit 1: it is busy (exception 6)"
    )
    controller.refuses = False
    controller.wait_for_state(ONLINE)
    assert sink.close(5.0) == 0


def test_a_map_that_the_controller_has_no_registers_for_is_told_with_its_addresses(
    controller: Controller,
) -> None:
    remote = Modbus(config(controller.port, register=295, coil=None))
    with pytest.raises(SinkError, match="registers 295 to 310, unit 1: it has no such address"):
        remote.beat(is_held=False)
    remote.disconnect()


def test_a_controller_that_is_not_there_is_told_in_words() -> None:
    remote = Modbus(config(free_port()))
    with pytest.raises(SinkError, match=r"no connection within 0\.5 s; is the controller on"):
        remote.beat(is_held=False)
    remote.disconnect()


def test_numbers_of_32_bits_can_come_low_word_first(
    controller: Controller, journal: Journal
) -> None:
    sink = RemoteSink(Modbus(config(controller.port, word_order="low first")), journal)
    controller.wait_for_state(ONLINE)
    journal.append(frame(70_001))
    wait_for(lambda: controller.registers(5) == [1], what=sink.error)
    assert controller.registers(16, 2) == [70_001 % 65536, 1]
    assert controller.registers(6, 2) == [1, 0]
    assert sink.close(5.0) == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target": "modbus://plc:502/line"}, "no users and no paths"),
        ({"target": "modbus://bob:secret@plc"}, "no users and no paths"),
        ({"target": "plc:502"}, "write it like modbus://host:502"),
        ({"target": "modbus://plc", "register": 65500}, "leaves no room for the 144 registers"),
    ],
)
def test_an_address_or_a_register_that_cannot_be_is_refused(
    settings: dict[str, object], text: str
) -> None:
    with pytest.raises(UnknownOptionError, match=text) as caught:
        Modbus(msgspec.convert(settings | {"kind": "modbus"}, ModbusSink))
    assert "secret" not in str(caught.value)


def test_the_command_line_takes_an_address_as_it_is() -> None:
    table = parse_sink("modbus://10.0.0.5?register=100&unit=2")
    assert (table["kind"], table["target"]) == ("modbus", "modbus://10.0.0.5")
    assert (table["register"], table["unit"]) == (100, 2)
