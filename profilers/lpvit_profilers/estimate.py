"""An estimate of CPU power from its load. A model, never a measurement, and never a default.

    P = TDP * (0.1 + 0.9 * load**3)

is the load curve that codecarbon uses in machine mode. The user has to state the TDP, and the
quality `estimated` goes with every number.
"""

import time
from typing import Any

from lpvit_edge.deps import require
from lpvit_edge.errors import UnknownOptionError
from lpvit_profilers.base import Conditions, PowerSample, SourceInfo

RAIL = "CPU (estimated)"


class EstimatedSource:
    """CPU power as a function of load, for a TDP that the user states in watts."""

    def __init__(self, *, tdp_w: float) -> None:
        if not 0 < tdp_w < 2000:
            raise UnknownOptionError(
                f"the TDP is {tdp_w:g} W; state the processor's TDP in watts, such as 65"
            )
        self._tdp_w = tdp_w
        self._psutil: Any = None
        self._info: SourceInfo | None = None

    @property
    def info(self) -> SourceInfo:
        assert self._info is not None, "the source is not open"
        return self._info

    def open(self) -> None:
        """Raises MissingDependencyError without psutil."""
        self._psutil = require("psutil")
        self._psutil.cpu_percent(None)  # the first call only starts the interval
        self._info = SourceInfo(
            name="estimate",
            sensor=f"load curve at {self._tdp_w:g} W TDP",
            scope="cpu_package",
            quality="estimated",
            total_rule=RAIL,
            rails=(RAIL,),
            resolution_mw=None,
            period_s=0.1,
            averaging_s=0.1,
            has_counter=False,
            gain_class=None,
            notes=("a model of the load, not a measurement",),
        )

    def sample(self) -> PowerSample:
        """Power at the load since the sample before."""
        load = self._psutil.cpu_percent(None) / 100
        power_mw = estimated_power_mw(load, tdp_w=self._tdp_w)
        return PowerSample(
            t_ns=time.monotonic_ns(),
            rails_mw={RAIL: power_mw},
            total_mw=power_mw,
            quality="estimated",
        )

    def conditions(self) -> Conditions:
        return Conditions()

    def close(self) -> None:
        self._psutil, self._info = None, None


def estimated_power_mw(load: float, *, tdp_w: float) -> float:
    """The load curve; `load` is 0 to 1 over all cores."""
    return float(tdp_w * 1000 * (0.1 + 0.9 * load**3))
