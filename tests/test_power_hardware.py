"""The power sources on the hardware they are made for.

Each skips where its sensor is absent; LPVIT_REQUIRE_HARDWARE=nvml (jetson-sysfs, rapl) turns that
skip into a failure on a machine that is meant to have it.
"""

import os
import time
from collections.abc import Callable

import pytest

from lpvit_profilers.base import PowerSource, opened
from lpvit_profilers.detect import detect
from lpvit_profilers.energy import measure_energy
from lpvit_profilers.jetson_sysfs import JetsonSysfsSource
from lpvit_profilers.nvml import NvmlSource
from lpvit_profilers.rapl import RaplSource

SOURCES: dict[str, Callable[[], PowerSource]] = {
    "jetson-sysfs": JetsonSysfsSource,
    "nvml": NvmlSource,
    "rapl": RaplSource,
}


def need(name: str) -> PowerSource:
    """The source, or a skip with its reason, or a failure where the machine must have it."""
    found = {detected.name: detected for detected in detect()}[name]
    if not found.usable:
        assert os.environ.get("LPVIT_REQUIRE_HARDWARE") != name, found.reason
        pytest.skip(f"{name}: {found.reason}")
    return SOURCES[name]()


@pytest.mark.hardware("power")
@pytest.mark.parametrize("name", SOURCES)
def test_an_idle_machine_draws_something_that_moves(name: str) -> None:
    with opened(need(name)) as source:
        samples = []
        for _ in range(40):
            samples.append(source.sample())
            time.sleep(0.05)
    totals = [sample.total_mw for sample in samples[1:] if sample.total_mw is not None]
    assert len(totals) == len(samples) - 1
    assert min(totals) > 0
    assert len(set(totals)) > 1


@pytest.mark.hardware("nvml")
def test_counter_and_integrated_power_of_a_gpu_agree_within_5_percent() -> None:
    source = need("nvml")
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA to make a load with")
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)

    def multiply() -> None:
        torch.matmul(a, a)
        torch.cuda.synchronize()

    with opened(source):
        found = measure_energy(multiply, source, window_s=5.0, repeats=3, max_warmup_s=15.0)
    assert found.idle_before_mw is not None
    assert found.mean_power_mw is not None
    assert found.mean_power_mw > found.idle_before_mw
    for repeat in found.repeats:
        assert repeat.counter_mj is not None
        assert repeat.integral_mj == pytest.approx(repeat.counter_mj, rel=0.05)
