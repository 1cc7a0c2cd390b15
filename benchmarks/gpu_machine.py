"""What decides a GPU's numbers beside its name: driver, power limit and clocks, by NVML."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.gpu_records import Machine
from lpvit_edge.deps import require
from lpvit_edge.errors import MissingDependencyError


def gpu_machine() -> Machine:
    """The device that torch calls 0, as it is now; CUDA_VISIBLE_DEVICES may hide others."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    try:
        return told_by(require("pynvml"), uuid=uuid)
    except MissingDependencyError as error:
        return silent(str(error))


def told_by(nvml: Any, *, uuid: str) -> Machine:
    """What NVML tells of a device; a question that it does not answer leaves a reason."""
    reasons: list[str] = []

    def ask(what: str, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nvml.NVMLError as error:
            reasons.append(f"{what}: {error}")
            return None

    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return silent(f"NVML: {error}")
    try:
        device = nvml.nvmlDeviceGetHandleByUUID(uuid)
        driver = ask("driver", nvml.nvmlSystemGetDriverVersion)
        limit_mw = ask("power limit", lambda: nvml.nvmlDeviceGetPowerManagementLimit(device))
        sm, memory = nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM
        return Machine(
            driver=driver.decode() if isinstance(driver, bytes) else driver,
            triton=triton_version(),
            power_limit_w=None if limit_mw is None else limit_mw / 1e3,
            sm_clock_max_mhz=ask(
                "highest SM clock", lambda: nvml.nvmlDeviceGetMaxClockInfo(device, sm)
            ),
            sm_clock_mhz=ask("SM clock", lambda: nvml.nvmlDeviceGetClockInfo(device, sm)),
            memory_clock_mhz=ask(
                "memory clock", lambda: nvml.nvmlDeviceGetClockInfo(device, memory)
            ),
            reasons=tuple(reasons),
        )
    except nvml.NVMLError as error:
        return silent(f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()


def silent(reason: str) -> Machine:
    """A device of which nothing is known, and why."""
    return Machine(
        driver=None, triton=triton_version(), power_limit_w=None, sm_clock_max_mhz=None,
        sm_clock_mhz=None, memory_clock_mhz=None, reasons=(reason,),
    )  # fmt: skip


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None
