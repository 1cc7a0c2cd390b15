"""What a run of the GPU benchmarks leaves behind when cut off, and what it says of the GPU."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares torch's kernels")
pytest.importorskip("timm", reason="the whole-model benchmark builds a timm model")

from benchmarks import gpu_kernels, gpu_model, gpu_tune  # noqa: E402
from benchmarks.gpu_machine import silent, told_by  # noqa: E402
from benchmarks.gpu_output import RUNNING, collected, ended, save, without, writable  # noqa: E402
from benchmarks.gpu_records import KernelTable, ModelTable, TuneTable  # noqa: E402
from benchmarks.gpu_rounds import DeviceLostError  # noqa: E402
from benchmarks.gpu_timing import Roofline  # noqa: E402

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


@pytest.mark.parametrize(
    ("module", "part", "table"),
    [
        (gpu_kernels, "bench_all", KernelTable),
        (gpu_model, "bench_all", ModelTable),
        (gpu_tune, "tune_all", TuneTable),
    ],
)
def test_a_whole_command_writes_its_table_and_says_that_the_device_was_lost(
    module: Any,
    part: str,
    table: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the command line to the file, on a torch.cuda that only has names."""

    def parts(*_: Any, **__: Any) -> Iterator[list[Any]]:
        yield []
        raise DeviceLostError("the device was lost at torch bsr")

    properties = SimpleNamespace(L2_cache_size=50 << 20, multi_processor_count=132)
    for name, answer in {
        "is_available": True, "get_device_name": "a GPU", "get_device_properties": properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(
        module, "measured_roofline", lambda **_: Roofline(flops_per_s=1e12, bytes_per_s=1e9)
    )
    monkeypatch.setattr(module, "gpu_machine", lambda: silent("no NVML"))
    monkeypatch.setattr(module, "require", lambda name: None, raising=False)
    monkeypatch.setattr(module, part, parts)
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["x", "--json", str(out)])
    assert module.main() == 1
    found = msgspec.json.decode(out.read_bytes(), type=table)
    assert (found.unfinished, found.device) == ("the device was lost at torch bsr", "a GPU")
    assert found.torch == str(torch.__version__)
    assert "unfinished: the device was lost" in capsys.readouterr().err
