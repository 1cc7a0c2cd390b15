"""Power of NVIDIA GPUs through NVML (`nvidia-ml-py`, extra "nvml").

What a call returns is not what its name says: on Ampere (except GA100) and newer the power call
is a mean over one second, and only the field value POWER_INSTANT is near the moment (NVML
documentation; Yang et al., SC'24, arXiv 2312.02741). So every call is tried when the source
opens. NotSupported is not 0, and a GPU never draws exactly 0, so a 0 is no reading either.
"""

import time
from collections.abc import Callable
from typing import Any

import msgspec

from lpvit_edge.deps import require
from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_profilers.base import Conditions, PowerSample, SourceInfo
from lpvit_profilers.nvml_probe import SensorTiming, probe_averaging, probe_update_period

# NVML field identifiers, nvml.h.
_POWER_AVERAGE, _POWER_INSTANT = 185, 186
_FUNCTION_NOT_FOUND = 13  # nvmlReturn_t, nvml.h
# Clock event reasons of nvml.h that slow a GPU against its will.
SLOWING = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
# Steady-state error of the sensor against an external meter, arXiv 2312.02741: most boards
# within 5 %, some 10 %.
GAIN_CLASS = 0.05
_AVERAGED_S = 1.0
_PERIOD_S = 0.1  # what most boards show, where the probe cannot tell
_COUNTER_TRIES = 6


class NvmlCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What each call answered at the start: None means usable, a text says why it is not."""

    instant: str | None
    average: str | None
    power: str | None
    counter: str | None


class NvmlSource:
    """One GPU board. Opening it takes `probe_s` to find how often the power is updated.

    `library`, `sleep` and `clock` replace pynvml and the time in tests.
    """

    def __init__(
        self,
        index: int = 0,
        *,
        probe_s: float = 1.0,
        library: Any = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._index = index
        self._probe_s = probe_s
        self._nvml = library
        self._sleep = sleep
        self._clock = clock
        self._device: Any = None
        self._read_power: Callable[[], float | str] = lambda: "the source is not open"
        self._has_counter = False
        self._info: SourceInfo | None = None
        self.capabilities: NvmlCapabilities | None = None

    @property
    def info(self) -> SourceInfo:
        assert self._info is not None, "the source is not open"
        return self._info

    def open(self) -> None:
        """Initialise NVML in this process and try every call.

        Raises MissingDependencyError without the library, EnvironmentUnfitError without a GPU or
        where no call returns a power.
        """
        self._nvml = self._nvml or require("pynvml")
        try:
            self._nvml.nvmlInit()
            self._device = self._nvml.nvmlDeviceGetHandleByIndex(self._index)
            name = _text(self._nvml.nvmlDeviceGetName(self._device))
        except self._nvml.NVMLError as error:
            raise EnvironmentUnfitError(
                f"NVML finds no GPU {self._index}: {error}; check that nvidia-smi works here"
            ) from error
        try:
            self._probe(name)
        except EnvironmentUnfitError:
            self.close()
            raise

    def _probe(self, name: str) -> None:
        readings = {
            "instant": self._field(_POWER_INSTANT),
            "average": self._field(_POWER_AVERAGE),
            "power": self._power_usage(),
        }
        counter = self._counter_verdict()
        failed = {key: value for key, value in readings.items() if isinstance(value, str)}
        self.capabilities = NvmlCapabilities(
            instant=failed.get("instant"),
            average=failed.get("average"),
            power=failed.get("power"),
            counter=counter,
        )
        if len(failed) == len(readings):
            raise EnvironmentUnfitError(
                f"{name} answers no power call (instant: {failed['instant']}; average: "
                f"{failed['average']}; usage: {failed['power']}); on a Jetson use its rails"
            )
        best = next(key for key in readings if key not in failed)
        readers: dict[str, Callable[[], float | str]] = {
            "instant": lambda: self._field(_POWER_INSTANT),
            "average": lambda: self._field(_POWER_AVERAGE),
            "power": self._power_usage,
        }
        self._read_power, self._has_counter = readers[best], counter is None
        timing = probe_update_period(self._read_slowly, for_s=self._probe_s, clock=self._clock)
        self._info = _describe(name, best, counter, timing)

    def probe_averaging(self, load: Callable[[], object], *, for_s: float = 3.0) -> SensorTiming:
        """Find how far back a reading looks, from a step of idle to `load`, and remember it.

        `load` is called again and again and must be short and synchronous. The GPU must be idle
        before.
        """
        found = probe_averaging(self._read_slowly, load, for_s=for_s, clock=self._clock)
        if found.averaging_s is not None:
            # A step that shows within one update tells only that the window is no longer than that.
            averaging_s = max(found.averaging_s, self.info.period_s)
            self._info = msgspec.structs.replace(self.info, averaging_s=averaging_s)
        return found

    def _read_slowly(self) -> float | None:
        """A reading at most every millisecond; some drivers answer zeros when pressed harder."""
        self._sleep(0.001)
        value = self._read_power()
        return None if isinstance(value, str) else value

    def sample(self) -> PowerSample:
        """Board power, and the energy counter where it counts."""
        power_mw = self._read_power()
        energy_mj = self._counter() if self._has_counter else None
        t_ns = time.monotonic_ns()
        if isinstance(power_mw, str):
            return PowerSample(
                t_ns=t_ns,
                rails_mw={},
                total_mw=None,
                quality="unavailable",
                energy_mj=energy_mj if isinstance(energy_mj, float) else None,
                reason=power_mw,
            )
        return PowerSample(
            t_ns=t_ns,
            rails_mw={"GPU board": power_mw},
            total_mw=power_mw,
            quality="measured",
            energy_mj=energy_mj if isinstance(energy_mj, float) else None,
        )

    def conditions(self) -> Conditions:
        """Temperature, SM clock and the reasons that slow the GPU, each only where it answers."""
        nvml, device = self._nvml, self._device
        temperature = self._ask(lambda: nvml.nvmlDeviceGetTemperature(device, 0))
        clock = self._ask(lambda: nvml.nvmlDeviceGetClockInfo(device, 1))
        mask = self._ask(lambda: _event_reasons(nvml, device))
        return Conditions(
            temperature_c=None if isinstance(temperature, str) else temperature,
            clock_mhz=None if isinstance(clock, str) else clock,
            throttling=None
            if isinstance(mask, str)
            else tuple(text for bit, text in SLOWING.items() if int(mask) & bit),
        )

    def close(self) -> None:
        if self._device is not None:
            self._ask(self._shutdown)
        self._device, self._info = None, None

    def _shutdown(self) -> float:
        self._nvml.nvmlShutdown()
        return 0.0

    def _ask(self, call: Callable[[], Any]) -> float | str:
        """A number, or why there is none: the one seam where NVML's errors become text."""
        try:
            return float(call())
        except self._nvml.NVMLError as error:
            return str(error)

    def _power_usage(self) -> float | str:
        value = self._ask(lambda: self._nvml.nvmlDeviceGetPowerUsage(self._device))
        return "it answered 0 mW, which no GPU draws" if value == 0 else value

    def _counter(self) -> float | str:
        return self._ask(lambda: self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))

    def _field(self, field: int) -> float | str:
        try:
            (answer,) = self._nvml.nvmlDeviceGetFieldValues(self._device, [field])
        except self._nvml.NVMLError as error:
            return str(error)
        if answer.nvmlReturn != 0:
            return f"NVML error {answer.nvmlReturn}"
        value = float(answer.value.uiVal)
        return value if value > 0 else "it answered 0 mW, which no GPU draws"

    def _counter_verdict(self) -> str | None:
        """None when the counter counts. It steps about every 100 ms, so it gets 300 ms."""
        first = self._counter()
        for _ in range(_COUNTER_TRIES):
            if isinstance(first, str):
                return first
            self._sleep(0.3 / _COUNTER_TRIES)
            latest = self._counter()
            if isinstance(latest, float) and latest > first:
                return None
        return f"it stood at {first:g} mJ for 300 ms"


def _event_reasons(nvml: Any, device: Any) -> int:
    """The call was renamed from throttle to clock event reasons in the 12.535 bindings."""
    for name in (
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetCurrentClocksThrottleReasons",
    ):
        if hasattr(nvml, name):
            return int(getattr(nvml, name)(device))
    raise nvml.NVMLError(_FUNCTION_NOT_FOUND)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _describe(name: str, best: str, counter: str | None, timing: SensorTiming) -> SourceInfo:
    notes = [] if counter is None else [f"no energy counter: {counter}"]
    if best != "instant":
        notes.append("this power call may be a mean over the last second")
    if timing.update_period_s is None:
        notes.append(f"update period taken as {_PERIOD_S:g} s: {timing.reason}")
    return SourceInfo(
        name="nvml",
        sensor=name,
        scope="gpu_board",
        quality="measured",
        total_rule=f"GPU board ({best})",
        rails=("GPU board",),
        resolution_mw=1.0,
        period_s=timing.update_period_s or _PERIOD_S,
        averaging_s=0.1 if best == "instant" else _AVERAGED_S,
        has_counter=counter is None,
        gain_class=GAIN_CLASS,
        notes=tuple(notes),
    )
