"""What a run of the GPU benchmarks leaves behind when cut off, and what it says of the GPU."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="the benchmark compares torch's kernels")

from benchmarks.gpu_machine import told_by
from benchmarks.gpu_output import RUNNING, collected, ended, save, without, writable
from benchmarks.gpu_rounds import DeviceLostError

Written = list[tuple[tuple[int, ...], str | None]]


def run_of(parts: list[Any], written: Written) -> tuple[tuple[int, ...], str | None]:
    """Parts that are lists of rows, or the error that ends the run there."""

    def measured() -> Iterator[list[int]]:
        for part in parts:
            if isinstance(part, BaseException):
                raise part
            yield part

    return collected(measured(), write=lambda rows, why: written.append((rows, why)))


def test_the_table_is_written_after_every_part_and_calls_itself_finished_at_the_end() -> None:
    written: Written = []
    assert run_of([[1, 2], [3]], written) == ((1, 2, 3), None)
    assert written == [((1, 2), RUNNING), ((1, 2, 3), RUNNING), ((1, 2, 3), None)]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (DeviceLostError("lost at torch bsr"), "lost at torch bsr"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_run_that_is_cut_off_keeps_the_rows_of_finished_parts_and_says_why(
    end: BaseException, reason: str
) -> None:
    written: Written = []
    assert run_of([[1], end, [2]], written) == ((1,), reason)
    assert written[-1] == ((1,), reason)
    assert (ended(reason), ended(None)) == (1, 0)


def test_an_error_that_is_no_ones_refusal_leaves_the_parts_before_it() -> None:
    written: Written = []
    with pytest.raises(TypeError):
        run_of([[1], TypeError("a mistake")], written)
    assert written == [((1,), RUNNING)]


def test_a_folder_that_does_not_exist_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    for path in (tmp_path / "missing" / "out.json", tmp_path):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot be written"):
            writable(str(path))
    assert writable(str(tmp_path / "out.json")) == tmp_path / "out.json"


def test_a_table_replaces_the_one_before_it_whole(tmp_path: Path) -> None:
    class Table(msgspec.Struct):
        rows: int

    path = tmp_path / "out.json"
    for rows in (1, 2):
        save(Table(rows=rows), path)
    save(Table(rows=3), None)
    assert msgspec.json.decode(path.read_bytes(), type=Table).rows == 2
    assert list(tmp_path.iterdir()) == [path]


def test_skipped_contestants_stay_out_and_dense_stays_in() -> None:
    entrants = {"dense cuBLAS": 1, "2:4 cuSPARSELt": 2, "ours 64x64": 3}
    assert without(entrants, ["2:4", "cuBLAS"]) == {"dense cuBLAS": 1, "ours 64x64": 3}


class NvmlError(Exception):
    pass


def nvml(**changes: Any) -> Any:
    """NVML of a device whose clocks are its kind of clock times 100."""
    answers: dict[str, Any] = {
        "NVMLError": NvmlError, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2,
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlSystemGetDriverVersion": lambda: b"550.54",
        "nvmlDeviceGetPowerManagementLimit": lambda device: 700_000,
        "nvmlDeviceGetMaxClockInfo": lambda device, kind: 1000 * kind,
        "nvmlDeviceGetClockInfo": lambda device, kind: 100 * kind,
    }  # fmt: skip
    return SimpleNamespace(**(answers | changes))


def refuse(*_: Any) -> Any:
    raise NvmlError("Not Supported")


def test_driver_power_limit_and_clocks_are_written_down() -> None:
    found = told_by(nvml(), uuid="GPU-1")
    assert (found.driver, found.power_limit_w, found.reasons) == ("550.54", 700.0, ())
    clocks = (found.sm_clock_max_mhz, found.sm_clock_mhz, found.memory_clock_mhz)
    assert clocks == (1000, 100, 200)


def test_what_a_device_does_not_tell_is_none_with_its_reason() -> None:
    found = told_by(nvml(nvmlDeviceGetPowerManagementLimit=refuse), uuid="GPU-1")
    assert (found.power_limit_w, found.driver) == (None, "550.54")
    assert found.reasons == ("power limit: Not Supported",)
    for call in ("nvmlInit", "nvmlDeviceGetHandleByUUID"):
        found = told_by(nvml(**{call: refuse}), uuid="GPU-1")
        assert (found.driver, found.reasons) == (None, ("NVML: Not Supported",))
