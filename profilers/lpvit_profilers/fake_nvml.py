"""A pynvml that answers what a test tells it to: hand it to NvmlSource(library=...)."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

Answer = Callable[[], int | None]


class FakeNvml:
    """`None` from an answer is NotSupported. Times advance only through `sleep`."""

    class NVMLError(Exception):
        pass

    def __init__(
        self,
        *,
        instant: Answer = lambda: None,
        average: Answer = lambda: None,
        power: Answer = lambda: None,
        energy: Answer = lambda: None,
        reasons: int = 0,
        gpus: int = 1,
    ) -> None:
        self.now_s = 0.0
        self.is_up = False
        self._fields = {185: average, 186: instant}
        self._power, self._energy, self._reasons, self._gpus = power, energy, reasons, gpus

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def clock(self) -> int:
        return round(self.now_s * 1e9)

    def _answer(self, answer: Answer) -> int:
        value = answer()
        if value is None:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self) -> None:  # noqa: N802
        self.is_up = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_up = False

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index >= self._gpus:
            raise self.NVMLError("Invalid Argument")
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return b"Fake GPU"

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self._answer(self._power)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        return self._answer(self._energy)

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> list[Any]:  # noqa: N802
        values = [self._fields[field]() for field in fields]
        return [
            SimpleNamespace(
                nvmlReturn=3 if value is None else 0, value=SimpleNamespace(uiVal=value or 0)
            )
            for value in values
        ]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return 55

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:  # noqa: N802
        return self._reasons
