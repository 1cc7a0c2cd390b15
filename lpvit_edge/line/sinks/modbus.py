"""Verdicts to a controller over Modbus TCP: into its holding registers, and coils if wished.

Nothing is read and nothing acknowledged. All numbers are unsigned; those of 32 bits take two
registers. Offsets count from `register`:

 0      version of this map: 1
 1      run: another number after each start of the line
 2      heartbeat: changes a few times a second, never 0; one that stands still is a line that died
 3      state: 0 the line was stopped, 1 it judges, 2 held (no part can be judged)
 4      slots in the ring below
 5      verdicts written in this run, modulo 65536: the newest is in slot (written - 1) modulo slots
 6  8  10   parts that were ok, reject, safe in this run, 32 bits each, told or not
12      verdicts that were too old to be told, 32 bits
14 15   0
16 + 8 * slot   the ring, a slot for each verdict:
    0   number of the part, 32 bits          4   label: its place in the list of labels, from 1
    2   verdict: 1 ok, 2 reject, 3 safe      5   confidence in 1/10000; 0: none
    3   action: 1 pass, 2 reject             6   ms from trigger to this writing, at most 65535
                                             7   the part's number modulo 65536 once more

A verdict is written into its slot first, then into the coils, then `written` moves. Coils, from
`coil`: 0 the newest part is to be rejected, 1 the line judges. A part is rejected once: after
a hold, a lost connection, or a newer part that was too late, coil 0 stays clear until the next.
"""

import contextlib
import logging
import secrets
from collections.abc import Sequence
from typing import Any

from lpvit_edge.deps import require
from lpvit_edge.errors import SinkError, UnknownOptionError
from lpvit_edge.line.address import parse_address
from lpvit_edge.line.journal import Entry
from lpvit_edge.line.redact import redacted
from lpvit_edge.line.sink_config import ModbusSink
from lpvit_edge.line.sinks.tally import Tally, Timely

VERSION, HEADER, SLOT, SLOTS = 1, 16, 8, 16
_AT_ONCE = 15  # slots; a request writes at most 123 registers
OFFLINE, ONLINE, HELD = 0, 1, 2
_VERDICTS = {"ok": 1, "reject": 2, "safe": 3}
_ACTIONS = {"pass": 1, "reject": 2}
# MODBUS Application Protocol Specification V1.1b3, section 7.
_EXCEPTIONS = {
    1: "it does not know the function",
    2: "it has no such address",
    3: "it does not allow the value",
    4: "it failed",
    5: "it needs longer",
    6: "it is busy",
    10: "the gateway has no path",
    11: "the gateway's device does not answer",
}


class Modbus:
    """A client that keeps one connection and writes the map above."""

    batch = SLOTS
    longest_wait_s = 2.0

    def __init__(self, config: ModbusSink) -> None:
        """Take the address apart. Raises UnknownOptionError, MissingDependencyError."""
        self.name = f"modbus {redacted(config.target)}"
        self._config = config
        self._address = parse_address(config.target, {"modbus": 502}, option="modbus")
        if self._address.path or self._address.user is not None:
            raise UnknownOptionError(
                f"{self.name}: Modbus knows no users and no paths; write modbus://host:502"
            )
        last = config.register + HEADER + SLOT * SLOTS - 1
        if last > 65535:
            raise UnknownOptionError(
                f"{self.name}: register = {config.register} leaves no room for the "
                f"{HEADER + SLOT * SLOTS} registers of the map, the last would be {last}"
            )
        self._modbus = require("pymodbus.client")
        self._error: Any = require("pymodbus.exceptions").ModbusException
        # It tells each failed attempt to stderr otherwise; the line's events tell them once.
        logging.getLogger("pymodbus").addHandler(logging.NullHandler())
        self._tally = Tally(config.max_age_ms)
        self._client: Any = None
        self._is_sound = False  # the last request was answered
        self._run = 1 + secrets.randbelow(65535)
        self._heart = 0
        self._state = ONLINE
        self._written = 0
        self._told = 0  # newest entry written
        self._shown = 0  # newest entry that the coils were to show, answered or not
        self._rejects = False  # the newest part

    @property
    def missed(self) -> int:
        """Verdicts that were too old to be told."""
        return self._tally.missed

    def resume(self, delivered: int, newest: int) -> int:
        """What an earlier run decided happened to parts that are gone."""
        return newest

    def too_old(self, entries: Sequence[Entry]) -> int:
        """How many of the first entries need not be sent."""
        return self._tally.too_old(entries)

    def send(self, entries: Sequence[Entry]) -> None:
        """Write the verdicts that are young enough.

        Several that wait go into one request, since a controller may answer only one in each of
        its cycles; where coils show them, each is written by itself.
        """
        left = list(entries)
        while left:
            count = 1 if self._config.coil is not None else _AT_ONCE
            some, left = left[:count], left[count:]
            taken = [self._tally.take(entry) for entry in some]
            timely = [found for found in taken if found is not None and found.entry > self._told]
            if timely:
                self._tell(timely)
            if taken[-1] is None and some[-1].kind == "frame":
                self._forget_reject()  # the newest part is another, and was too late to be told
        self._tally.forget(entries[-1].id)

    def beat(self, *, is_held: bool) -> None:
        """Write the header with another heartbeat."""
        self._state = HELD if is_held else ONLINE
        if is_held:
            self._rejects = False  # afterwards the part is gone
        client = self._connected()
        self._write_coils(client)
        self._write(client, 0, self._next_header())

    def disconnect(self) -> None:
        """Say that the line was stopped, where the controller still answers, and let go."""
        client, self._client = self._client, None
        self._rejects = False
        if client is None:
            return
        if self._is_sound:
            self._state = OFFLINE
            with contextlib.suppress(SinkError):
                self._write_coils(client)
                self._write(client, 0, self._header(self._written))
        client.close()

    def _forget_reject(self) -> None:
        if self._rejects:
            self._rejects = False
            self._write_coils(self._connected())

    def _tell(self, timely: list[Timely]) -> None:
        """Each request may take its time: what turned too old is not made known by the next."""
        client = self._connected()
        timely = self._put_into_slots(client, self._tally.still(timely))
        if not timely:
            self._forget_reject()
            return
        if self._config.coil is not None:
            self._show(client, timely[-1])
            timely = self._tally.still(timely)  # there is one
        if timely:
            self._write(client, 0, self._next_header(len(timely)))
            self._written += len(timely)
            self._told = timely[-1].entry

    def _put_into_slots(self, client: Any, timely: list[Timely]) -> list[Timely]:
        """Those that stand in the next slots now, and can still be acted on."""
        while timely:
            first = self._written % SLOTS
            before_wrap = SLOTS - first
            for place, some in ((first, timely[:before_wrap]), (0, timely[before_wrap:])):
                if some:
                    registers = [word for one in some for word in self._slot(one)]
                    self._write(client, HEADER + SLOT * place, registers)
            young = self._tally.still(timely)
            if len(young) == len(timely):
                break
            timely = young
        return timely

    def _show(self, client: Any, newest: Timely) -> None:
        """By the coil, once: where an answer was lost the part may have been rejected already."""
        rejects, is_again = newest.record.action == "reject", newest.entry <= self._shown
        if rejects and is_again:
            self._tally.miss(newest.entry)
        self._rejects, self._shown = rejects and not is_again, newest.entry
        self._write_coils(client)

    def _next_header(self, more: int = 0) -> list[int]:
        """With another heartbeat: verdicts that are written slowly may leave no time for others."""
        self._heart = self._heart % 65535 + 1
        return self._header(self._written + more)

    def _header(self, written: int) -> list[int]:
        tally = self._tally
        return [
            VERSION,
            self._run,
            self._heart,
            self._state,
            SLOTS,
            written % 65536,
            *self._long(tally.ok),
            *self._long(tally.reject),
            *self._long(tally.safe),
            *self._long(tally.missed),
            0,
            0,
        ]

    def _slot(self, timely: Timely) -> list[int]:
        record = timely.record
        likeliest = max(record.probabilities, default=0.0)
        return [
            *self._long(record.number),
            _VERDICTS[record.verdict],
            _ACTIONS[record.action],
            record.probabilities.index(likeliest) + 1 if record.probabilities else 0,
            round(10_000 * (record.confidence or 0.0)),
            min(round(timely.age_ms), 65535),
            record.number % 65536,
        ]

    def _long(self, value: int) -> tuple[int, int]:
        high, low = value >> 16 & 0xFFFF, value & 0xFFFF
        return (high, low) if self._config.word_order == "high first" else (low, high)

    def _write_coils(self, client: Any) -> None:
        if self._config.coil is None:
            return
        values = [self._rejects and self._state == ONLINE, self._state == ONLINE]
        self._check(
            client.write_coils, self._config.coil, values, f"coils from {self._config.coil}"
        )

    def _write(self, client: Any, offset: int, values: list[int]) -> None:
        first = self._config.register + offset
        text = f"registers {first} to {first + len(values) - 1}"
        self._check(client.write_registers, first, values, text)

    def _check(self, write: Any, address: int, values: list[Any], text: str) -> None:
        """Write, and have the answer. Raises SinkError in words."""
        self._is_sound = False
        try:
            answer = write(address, values, device_id=self._config.unit)
        except (self._error, OSError) as error:
            raise SinkError(
                f"{self.name}: the connection was lost, or no answer came within "
                f"{self._config.timeout_s:g} s ({type(error).__name__})"
            ) from error
        self._is_sound = True
        if answer.isError():
            code = answer.exception_code
            raise SinkError(
                f"{self.name}: the controller refused to write {text}, unit {self._config.unit}: "
                f"{_EXCEPTIONS.get(code, 'for a reason of its own')} (exception {code})"
            )

    def _connected(self) -> Any:
        if self._client is None:
            client = self._modbus.ModbusTcpClient(
                self._address.host,
                port=self._address.port,
                timeout=self._config.timeout_s,
                retries=0,
            )
            if not client.connect():
                raise SinkError(
                    f"{self.name}: no connection within {self._config.timeout_s:g} s; is the "
                    "controller on, its Modbus server enabled, and the address right?"
                )
            self._client = client
        return self._client
