"""The GPU benchmarks' records as text, 100 columns wide."""

from benchmarks.gpu_records import Goal, KernelRow, ModelRow, TuneRow
from benchmarks.gpu_rounds import Spread

KERNEL_HEAD = (
    f"{'kernel':22} {'us a launch':>22} {'x dense':>16} {'x torch bsr':>16} {'floor us':>12} error"
)
_TIME, _GAIN, _FLOOR = "ms an inference, below mJ an image", "x dense", "floor ms"
MODEL_HEAD = f"{'model':20} {_TIME:>36} {_GAIN:>18} {_FLOOR:>14} error"

TUNE_HEAD = f"{'block':6} {'ships, us':>22} {'tuned, us':>22} {'x shipped':>16} {'x dense':>16}"


def kernel_line(row: KernelRow) -> str:
    """One contestant: median (quartiles) of its time and gains, floor and how close it is."""
    if row.time_us is None:
        return f"{row.kernel:22} -- {row.reason}"
    return (
        f"{row.kernel:22} {number(row.time_us, 1):>22} {number(row.over_dense, 2):>16} "
        f"{number(row.over_bsr, 2):>16} {floor(row.floor_us, row.time_us, 1):>12} "
        f"{row.error:.0e}"
    )


def model_lines(row: ModelRow) -> str:
    """One model: its time and gain, floor and error, and below them its energy and gain."""
    if row.latency_ms is None:
        return f"{row.model:20} -- {row.reason}"
    energy = (
        f"-- {row.energy_reason}"
        if row.energy_mj_per_image is None
        else f"{number(row.energy_mj_per_image, 1):>33} mJ {number(row.energy_over_dense, 2):>18}"
    )
    return (
        f"{row.model:20} {number(row.latency_ms, 3):>33} ms {number(row.over_dense, 2):>18} "
        f"{floor(row.floor_ms, row.latency_ms, 3):>14} {row.error:.0e}\n{'':20} {energy}"
    )


def tune_line(row: TuneRow) -> str:
    """One block shape: the kernel that ships, the best setting, and its gains."""
    if row.setting is None or row.tuned_us is None:
        return f"{row.block:6} -- {row.verdict}"
    return (
        f"{row.block:6} {number(row.shipped_us, 1):>22} {number(row.tuned_us, 1):>22} "
        f"{number(row.over_shipped, 2):>16} {number(row.over_dense, 2):>16}"
        f"{'  fastest' if row.is_fastest else ''}\n"
        f"{'':6} {row.setting.name}: {row.verdict}; floor {floor(row.floor_us, row.tuned_us, 1)}"
    )


def number(found: Spread | None, digits: int) -> str:
    """A median with its quartiles: 41.2 (40.9-41.8)."""
    if found is None:
        return "--"
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def floor(found: float | None, time: Spread, digits: int) -> str:
    """The roofline's floor, and what part of the time it is."""
    return "--" if found is None else f"{found:.{digits}f} {found / time.median:4.0%}"


def goal_line(goal: Goal) -> str:
    at = "" if goal.where is None else f" at {goal.where}"
    return f"{goal.goal}: {goal.verdict}; {number(goal.found, 2)}{at}, wanted {goal.wanted:g}"
