"""A real Modbus server in this process, with the program that docs/deploy.md gives a controller."""

import asyncio
import threading
from typing import Any

import pytest

pytest.importorskip("pymodbus.server", reason="extra modbus is not installed")
from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from tests.broker import free_port, wait_for

FIRST, COIL = 100, 20  # where the map lies


class Controller:
    """Its memory is empty after each start, as after a power failure without retentive memory."""

    def __init__(self, *, registers: int = 300) -> None:
        self.port = free_port()
        self._registers = registers
        self._pointer, self._run = 0, 0
        self.refuses = False
        self.is_frozen = False
        self.cycle_s = 0.0  # it answers one request in each
        self.verdicts: list[dict[str, int]] = []
        self.overwritten = 0
        self.start()

    def start(self) -> None:
        """Switch it on."""
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(10.0)

    def stop(self) -> None:
        """Cut its power."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    async def _serve(self) -> None:
        bits, words = DataType.BITS, DataType.REGISTERS
        device = SimDevice(
            id=1,
            simdata=(
                [SimData(0, count=50, values=False, datatype=bits)],
                [SimData(0, count=1, values=False, datatype=bits)],
                [SimData(0, count=self._registers, values=0, datatype=words)],
                [SimData(0, count=1, values=0, datatype=words)],
            ),
            action=self._judge_request,
        )
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._server = ModbusTcpServer(device, address=("127.0.0.1", self.port))
        await self._server.serve_forever(background=True)
        self._started.set()
        await self._stopping.wait()
        await self._server.shutdown()

    async def _judge_request(self, function: int, *_: Any) -> ExcCodes | None:
        if function > 4:
            await asyncio.sleep(self.cycle_s)
        while self.is_frozen and function > 4:
            await asyncio.sleep(0.02)
        return ExcCodes.DEVICE_BUSY if self.refuses and function > 4 else None

    def _read(self, function: int, address: int, count: int) -> list[Any]:
        reading = self._server.async_getValues(1, function, address, count)
        values: list[Any] = asyncio.run_coroutine_threadsafe(reading, self._loop).result(5.0)
        return values

    def registers(self, offset: int, count: int = 1) -> list[int]:
        return self._read(3, FIRST + offset, count)

    def coils(self) -> list[bool]:
        return self._read(1, COIL, 2)

    def number(self, offset: int) -> int:
        """Of 32 bits."""
        high, low = self.registers(offset, 2)
        return high << 16 | low

    def scan(self) -> list[int]:
        """One cycle of the program: take every verdict that came; the numbers of all so far."""
        _, run, _, _, slots, written = self.registers(0, 6)
        if run != self._run:
            self._run, self._pointer = run, 0
        ahead = (written - self._pointer) % 65536
        if ahead > slots:
            self.overwritten += ahead - slots
            self._pointer = (written - slots) % 65536
        while self._pointer != written:
            slot = self.registers(16 + 8 * (self._pointer % slots), 8)
            assert slot[1] == slot[7], slot
            self.verdicts.append(
                {
                    "number": slot[0] << 16 | slot[1], "verdict": slot[2], "action": slot[3],
                    "label": slot[4], "confidence": slot[5], "age_ms": slot[6],
                }
            )  # fmt: skip
            self._pointer = (self._pointer + 1) % 65536
        return [verdict["number"] for verdict in self.verdicts]

    def wait_for_state(self, state: int) -> None:
        wait_for(lambda: self.registers(3) == [state], what=f"state {state}")
