"""The GPU benchmark of layers without a GPU: the same paths on CPU tensors, under graphs that are
fakes."""

import struct
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="the benchmark compares torch's kernels")

from benchmarks import gpu_kernels, gpu_launch
from benchmarks.gpu_contestants import (
    Contestant,
    Problem,
    dense,
    ours,
    problem,
)
from benchmarks.gpu_machine import silent
from benchmarks.gpu_records import KernelRow, KernelTable
from benchmarks.gpu_rounds import WRONG, DeviceLostError, Spread, nothing
from benchmarks.gpu_timing import Roofline
from tests.cuda.fake_driver import State
from tests.cuda.fake_graphs import FakeGraphs

ROOFLINE = Roofline(flops_per_s=1e12, bytes_per_s=1e9)
OURS = "ours 64x64 d=0.5"


def small(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "out_features": 128, "in_features": 256, "tokens": 20, "dtype": "float16", "copies": 2,
        "device": "cpu",
    }  # fmt: skip
    return problem(**(given | changes))


def measured(
    graphs: FakeGraphs, entrants: dict[str, Any] | None = None, *, rounds: int = 4
) -> dict[str, KernelRow]:
    """The rows of dense and of other entrants, by name."""
    rows = gpu_kernels.bench(
        small(),
        {gpu_kernels.DENSE: dense, **(entrants or {})},
        layer="B qkv",
        batch=1,
        roofline=ROOFLINE,
        capture=graphs.capture,
        probe=nothing,
        rounds=rounds,
    )
    return {row.kernel: row for row in rows}


def enter_ours(given: Problem) -> Contestant:
    return ours(given, block=(64, 64), density=0.5)


@pytest.mark.parametrize("block", gpu_kernels.BLOCKS)
@pytest.mark.parametrize("density", [0.5, 0.3])
def test_our_contestant_is_right_and_gets_a_time(block: tuple[int, int], density: float) -> None:
    def enter(given: Problem) -> Contestant:
        return ours(given, block=block, density=density)

    row = measured(FakeGraphs(100.0, 50.0), {OURS: enter}, rounds=2)[OURS]
    assert (row.rounds_us, row.reason, row.density) == ((50.0, 50.0), None, density)
    assert row.over_dense == Spread(median=2.0, low=2.0, high=2.0)
    assert row.error is not None
    assert 0 < row.error < 2e-3


def test_all_contestants_are_captured_before_the_first_is_measured_and_then_take_turns() -> None:
    graphs = FakeGraphs()
    measured(graphs, {"first": enter_ours, "second": enter_ours}, rounds=2)
    assert graphs.events[:3] == ["capture 0 of 2", "capture 1 of 2", "capture 2 of 2"]
    turns = "".join(event.removeprefix("replay ") for event in graphs.events[3:])
    assert turns == "001122" + "221100"


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    row = measured(FakeGraphs())[gpu_kernels.DENSE]
    moved = 2 * (128 * 256 + 20 * 256 + 20 * 128)
    assert row.floor_us == pytest.approx(1e6 * moved / 1e9)
    assert ROOFLINE.floor_us(macs=1e9, moved_bytes=1.0) == pytest.approx(2000.0)


def test_a_wrong_result_is_not_even_captured_and_gets_no_time() -> None:
    def broken(given: Problem) -> Contestant:
        right = dense(given)
        return Contestant(
            run=lambda i: right.run(i) * 1.1,
            expected=right.expected,
            density=1.0,
            weight_bytes=right.weight_bytes,
        )

    graphs = FakeGraphs()
    row = measured(graphs, {"broken": broken})["broken"]
    assert (row.time_us, row.rounds_us, row.reason) == (None, (), WRONG)
    assert row.error is not None
    assert row.error > 0.05
    assert graphs.graphs == 1  # dense alone


def test_a_result_that_is_right_once_and_wrong_when_replayed_gets_no_time() -> None:
    """A kernel that reads what an earlier launch left behind."""

    def forgetful(given: Problem) -> Contestant:
        right, runs = dense(given), 0

        def run(i: int) -> Any:
            nonlocal runs
            runs += 1
            return right.run(i) * (1.0 if runs < 6 else 1.1)

        return Contestant(
            run=run, expected=right.expected, density=1.0, weight_bytes=right.weight_bytes
        )

    rows = measured(FakeGraphs(), {"forgetful": forgetful})
    row = rows["forgetful"]
    assert (row.time_us, row.rounds_us, row.reason) == (None, (), WRONG)
    assert rows[gpu_kernels.DENSE].time_us is not None


@pytest.mark.parametrize("where", ["entering", "capturing"])
def test_a_library_that_refuses_is_reported_and_the_others_go_on(where: str) -> None:
    def enter(given: Problem) -> Contestant:
        if where == "entering":
            raise RuntimeError("not on this device\nand a page of context")
        right, runs = dense(given), 0

        def run(i: int) -> Any:
            nonlocal runs
            runs += 1
            if runs > 1:
                raise RuntimeError("not on this device\nand a page of context")
            return right.run(i)

        return Contestant(
            run=run, expected=right.expected, density=1.0, weight_bytes=right.weight_bytes
        )

    rows = measured(FakeGraphs(), {"refused": enter, OURS: enter_ours})
    assert rows["refused"].reason == "RuntimeError: not on this device"
    assert rows["refused"].time_us is None
    assert len(rows[gpu_kernels.DENSE].rounds_us) == len(rows[OURS].rounds_us) == 4


def test_a_contestant_that_loses_the_device_ends_the_layer_and_is_the_one_named() -> None:
    lost = False

    def enter(given: Problem) -> Contestant:
        nonlocal lost
        lost = True
        raise RuntimeError("an illegal memory access was encountered")

    def probe() -> None:
        if lost:
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(DeviceLostError, match=r"lost at faulty \(RuntimeError: an illegal"):
        gpu_kernels.bench(
            small(), {gpu_kernels.DENSE: dense, "faulty": enter, OURS: enter_ours}, layer="B qkv",
            batch=1, roofline=ROOFLINE, capture=FakeGraphs().capture, probe=probe, rounds=2,
        )  # fmt: skip


def test_without_a_dense_time_there_is_no_gain_over_it() -> None:
    def refuse(given: Problem) -> Contestant:
        raise RuntimeError("no cuBLAS")

    row = measured(FakeGraphs(), {gpu_kernels.DENSE: refuse, OURS: enter_ours})[OURS]
    assert row.time_us is not None
    assert row.over_dense is None


def test_ours_is_compared_with_the_fastest_of_torchs_kernels_at_its_density() -> None:
    def stand_in(density: float) -> Any:
        """torch's kernel needs a GPU: the dense one under its name."""

        def enter(given: Problem) -> Contestant:
            right = dense(given)
            return Contestant(
                run=right.run, expected=right.expected, density=density, weight_bytes=1
            )

        return enter

    names = {
        "torch bsr 64x64 d=0.5": 0.5,
        "torch bsr 32x32 d=0.5": 0.5,
        "torch bsr 64x64 d=0.3": 0.3,
    }
    graphs = FakeGraphs(100.0, 90.0, 80.0, 10.0, 40.0)
    entrants = {name: stand_in(density) for name, density in names.items()}
    row = measured(graphs, {**entrants, OURS: enter_ours})[OURS]
    assert row.bsr_peer == "torch bsr 32x32 d=0.5"
    assert row.over_bsr == Spread(median=2.0, low=2.0, high=2.0)
    assert row.over_dense == Spread(median=2.5, low=2.5, high=2.5)


def test_a_written_table_is_read_back_whole(tmp_path: Path) -> None:
    table = KernelTable(
        command="a command", device="none", machine=silent("no NVML"), unfinished=None,
        torch="2", cuda="12", dtype="float16", rounds=4,
        peak_tflops=1.0, bandwidth_gb_s=1.0, l2_mib=50.0,
        rows=tuple(measured(FakeGraphs()).values()), goals=(),
    )  # fmt: skip
    path = tmp_path / "table.json"
    path.write_bytes(msgspec.json.encode(table))
    assert msgspec.json.decode(path.read_bytes(), type=KernelTable) == table
    assert b'"format":3' in path.read_bytes()


@pytest.mark.parametrize("width", gpu_kernels.WIDTHS.values())
@pytest.mark.parametrize("factors", gpu_kernels.LAYERS.values())
@pytest.mark.parametrize("l2_mib", [4, 50, 126])  # Orin, H100, B200
def test_no_contestants_weights_fit_the_cache(
    width: int, factors: tuple[int, int], l2_mib: int
) -> None:
    out_features, in_features = (factor * width for factor in factors)
    copies = gpu_kernels.copies_of(out_features, in_features, l2_bytes=l2_mib << 20)
    kept_bytes = 2 * out_features * in_features * min(gpu_kernels.DENSITIES) * copies
    assert 3 * l2_mib << 20 <= kept_bytes <= (3 * l2_mib << 20) + 2 * out_features * in_features


def test_every_layer_meets_every_contestant() -> None:
    names = [name for name, _ in gpu_kernels.entrants()]
    assert len(names) == len(set(names)) == 2 + 2 * (5 * 3 + 6)
    assert names[0] == "dense cuBLAS"


def test_the_launch_benchmark_writes_what_it_measured_and_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "launch.json"
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "3", "--launches", "5", "--out", str(out)])
    assert gpu_launch.main() == 0
    found = msgspec.json.decode(out.read_bytes(), type=gpu_launch.LaunchTime)
    assert (found.rounds, found.launches) == (3, 5)
    assert found.command == f"python -m benchmarks.gpu_launch {' '.join(sys.argv[1:])}"
    assert [path.path for path in found.paths] == list(gpu_launch.PATHS)
    for path in found.paths:
        assert 0 < path.range_us[0] <= path.median_us <= path.range_us[1]


def test_every_way_to_a_launch_reaches_the_driver_with_the_same_numbers() -> None:
    with gpu_launch.fake_kernel() as kernel:
        state = State.in_dll(kernel._driver, "fake")
        for number, way in enumerate(gpu_launch.PATHS.values(), start=1):
            way(kernel)()
            assert (state.launches, list(state.grid)) == (number, [48, 4, 1])
            assert struct.unpack_from("<3i", bytes(state.parameters), 48) == (197, 768, 3072)


def test_the_record_of_launches_holds_the_median_the_quartiles_and_the_extremes() -> None:
    found = gpu_launch.path_time("a way", [5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median_us, found.quartiles_us, found.range_us) == (3.0, (1.5, 4.5), (1.0, 5.0))
    assert found.below_goal
    assert not gpu_launch.path_time("a way", [5.0, 5.0]).below_goal


def test_the_committed_launch_times_are_of_this_benchmark_and_the_launcher_meets_its_goal() -> None:
    path = Path(gpu_launch.__file__).parent / "results/gpu_launch.json"
    found = msgspec.json.decode(path.read_bytes(), type=gpu_launch.LaunchTime)
    assert (found.rounds, found.launches) == (gpu_launch.ROUNDS, gpu_launch.LAUNCHES)
    assert [way.path for way in found.paths] == list(gpu_launch.PATHS)
    assert found.goal_us == gpu_launch.GOAL_US
    for way in found.paths:
        assert way.below_goal == (way.median_us < found.goal_us)
    assert found.paths[0].below_goal
