"""What the GPU benchmarks write. A value that could not be had is None, and reason says why."""

from typing import Literal

import msgspec

from benchmarks.gpu_rounds import Spread


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides the numbers beside the device's name, as it was at the start of the run. What
    the device does not tell is None, and reasons say why."""

    driver: str | None
    triton: str | None
    power_limit_w: float | None
    sm_clock_max_mhz: int | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    reasons: tuple[str, ...]


class KernelRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One contestant on one layer.

    rounds_us are the measured rounds, microseconds per launch, and time_us their spread. Gains are
    quotients within a round: over_dense to cuBLAS, over_bsr to bsr_peer, the fastest of torch's
    kernels at the same density. floor_us is the device's measured roofline. error is the largest
    difference from float32 over the largest value. copies of the weight are walked over.
    """

    layer: str
    batch: int
    kernel: str
    density: float | None
    time_us: Spread | None
    over_dense: Spread | None
    over_bsr: Spread | None
    bsr_peer: str | None
    floor_us: float | None
    error: float | None
    copies: int
    rounds_us: tuple[float, ...]
    reason: str | None


class Goal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A goal and how it went: found is the gain where it is smallest, which `where` names."""

    goal: str
    wanted: float
    found: Spread | None
    where: str | None
    verdict: str


class KernelTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rows of one run, and what they depend on; unfinished says why there are no more."""

    kind: Literal["gpu_kernels"] = "gpu_kernels"
    format: Literal[3] = 3
    command: str
    device: str
    machine: Machine
    torch: str
    cuda: str
    dtype: str
    rounds: int
    peak_tflops: float
    bandwidth_gb_s: float
    l2_mib: float
    rows: tuple[KernelRow, ...]
    goals: tuple[Goal, ...]
    unfinished: str | None


class ModelRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One whole model at one batch.

    latency_ms is of one inference; floor_ms of the pruned linear layers alone, attention and norms
    come on top. Gains are quotients within a round, to the dense model. error is the largest
    difference from float32 over the largest logit.
    """

    model: str
    batch: int
    latency_ms: Spread | None
    over_dense: Spread | None
    floor_ms: float
    energy_mj_per_image: Spread | None
    energy_over_dense: Spread | None
    error: float | None
    rounds_ms: tuple[float, ...]
    rounds_mj_per_image: tuple[float, ...]
    reason: str | None
    energy_reason: str | None


class ModelTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All rows of one run, and what they depend on. energy_notes are the sensor's reservations;
    unfinished says why there are no more rows."""

    kind: Literal["gpu_model"] = "gpu_model"
    format: Literal[3] = 3
    command: str
    device: str
    machine: Machine
    torch: str
    dtype: str
    rounds: int
    energy_rounds: int
    energy_window_s: float
    energy_source: str
    energy_notes: tuple[str, ...]
    peak_tflops: float
    bandwidth_gb_s: float
    rows: tuple[ModelRow, ...]
    goals: tuple[Goal, ...]
    unfinished: str | None


class Setting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a kernel is compiled and launched; the defaults are what ships.

    tile_rows are the tokens of a tile. parts counts CTAs on each multiprocessor where the schedule
    is persistent, and parts of a block row's panels where it is split-K.
    """

    tile_rows: int = 64
    warps: int = 4
    stages: int = 5
    schedule: Literal["grid", "persistent", "split-K"] = "grid"
    parts: int = 1

    @property
    def name(self) -> str:
        tail = "" if self.schedule == "grid" else f" {self.schedule} {self.parts}"
        return f"{self.tile_rows} rows {self.warps} warps {self.stages} stages{tail}"


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One setting in the sieve or among the schedules; these numbers only choose."""

    setting: Setting
    time_us: Spread | None
    reason: str | None


class TuneRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One block shape on one layer. All but trials are of the final; gains are quotients within a
    round. is_fastest marks the block shape whose better kernel had the smallest median."""

    layer: str
    batch: int
    block: str
    density: float
    setting: Setting | None
    shipped_us: Spread | None
    tuned_us: Spread | None
    over_shipped: Spread | None
    over_dense: Spread | None
    floor_us: float | None
    is_fastest: bool
    verdict: str
    trials: tuple[Trial, ...]


class TuneTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the tuning writes; unfinished says why there are no more rows."""

    kind: Literal["gpu_tune"] = "gpu_tune"
    format: Literal[2] = 2
    command: str
    device: str
    machine: Machine
    multiprocessors: int
    torch: str
    dtype: str
    rounds: int
    sieve_rounds: int
    peak_tflops: float
    bandwidth_gb_s: float
    rows: tuple[TuneRow, ...]
    unfinished: str | None
