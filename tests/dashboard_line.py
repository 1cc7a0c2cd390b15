"""A sensor that does as it is told and a line's frames, for the tests of the page."""

import time

from lpvit_edge.dashboard.hub import Hub
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.line.records import FrameRecord, StageLatency, Verdict
from lpvit_profilers.base import Conditions, PowerSample, SourceInfo

INFO = SourceInfo(
    name="told",
    sensor="ina3221@test",
    scope="module_input",
    quality="measured",
    total_rule="VDD_IN",
    rails=("VDD_IN", "VDD_SOC"),
    resolution_mw=40.0,
    period_s=0.1,
    averaging_s=0.001,
    has_counter=False,
    gain_class=None,
)


class ToldSource:
    """Gives `power_mw` until `silent` is set; then nothing new, as a driver that hangs does."""

    def __init__(self, power_mw: float | None = 8000.0) -> None:
        self.power_mw = power_mw
        self.silent = False
        self.is_open = False
        self._last: PowerSample | None = None

    @property
    def info(self) -> SourceInfo:
        return INFO

    def open(self) -> None:
        self.is_open = True

    def sample(self) -> PowerSample:
        if not self.silent or self._last is None:
            rails = {} if self.power_mw is None else {"VDD_IN": self.power_mw, "VDD_SOC": 1500.0}
            self._last = PowerSample(
                t_ns=time.monotonic_ns(),
                rails_mw=rails,
                total_mw=self.power_mw,
                quality="unavailable" if self.power_mw is None else "measured",
                reason="the bus does not answer" if self.power_mw is None else None,
            )
        return self._last

    def conditions(self) -> Conditions:
        return Conditions(temperature_c=51.5, throttling=(), throttle_events=2, clock_mhz=1500.0)

    def close(self) -> None:
        self.is_open = False


def hub_of(source: ToldSource | None, **more: object) -> Hub:
    power = PowerMonitor(source, reason=None if source else "no power sensor can be read here")
    return Hub(device={"board": "Test board", "fingerprint": "0123"}, power=power, **more)  # type: ignore[arg-type]


def frame(number: int, *, verdict: Verdict = "ok", total_ms: float = 9.0) -> FrameRecord:
    return FrameRecord(
        number=number,
        source="synthetic",
        captured_at=time.time(),
        captured_ns=time.monotonic_ns(),
        verdict=verdict,
        action="pass" if verdict == "ok" else "reject",
        latency=StageLatency(wait_ms=1.0, infer_ms=6.0, total_ms=total_ms),
        label=verdict,
    )
