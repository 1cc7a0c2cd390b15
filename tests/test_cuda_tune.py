"""The tuning of the GPU kernels without a GPU: the search on fakes, the schedules as PTX."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch", reason="the tuning compares torch's kernels")

from benchmarks import gpu_tune
from benchmarks.gpu_contestants import BlockWeights, Contestant, Problem, problem
from benchmarks.gpu_machine import silent
from benchmarks.gpu_records import Setting, TuneRow, TuneTable
from benchmarks.gpu_rounds import WRONG, nothing
from benchmarks.gpu_settings import grid_settings, schedules_of
from benchmarks.gpu_tables import tune_line
from benchmarks.gpu_timing import Captured, Roofline
from cuda_src import compile as kernels
from lpvit_engines.cuda.torch_op import block_sparse_linear
from tests.cuda.fake_graphs import FakeGraphs

BLOCKS = ((64, 64), (64, 16))
SHIPPED_US, DENSE_US = 50.0, 60.0
Time = Callable[[Setting, BlockWeights], float]


class TimedRun:
    """A run that carries the time it is to take."""

    def __init__(self, run: Callable[[int], Any], time_us: float) -> None:
        self.run, self.time_us = run, time_us

    def __call__(self, i: int) -> Any:
        return self.run(i)


class TimedGraphs(FakeGraphs):
    """Each graph takes the time of its run; dense and what ships have none and take theirs."""

    def capture(self, run: Any, *, copies: int) -> Captured:
        if isinstance(run, TimedRun):
            time_us = run.time_us
        else:
            time_us = DENSE_US if run.__qualname__.startswith("dense") else SHIPPED_US
        made = super().capture(run, copies=copies)

        def sample_us() -> float:
            made.sample_us()
            return time_us

        return Captured(replay=made.replay, sample_us=sample_us, result=made.result, run=run)


def make_of(time_of: Time, *, factor: Callable[[Setting], float] = lambda _: 1.0) -> gpu_tune.Make:
    """Contestants that compute the layer, times a factor, in a time that depends on the setting."""

    def make(setting: Setting, weights: BlockWeights, given: Problem) -> Contestant:
        def run(i: int) -> Any:
            return block_sparse_linear(given.x, weights.copies[i]) * factor(setting)

        return Contestant(
            run=TimedRun(run, time_of(setting, weights)),
            expected=weights.expected,
            density=weights.density,
            weight_bytes=weights.weight_bytes,
        )

    return make


def tuned(make: gpu_tune.Make) -> dict[str, TuneRow]:
    given = problem(
        out_features=128, in_features=256, tokens=20, dtype="float16", copies=1, device="cpu"
    )
    rows = gpu_tune.tune(
        given,
        layer="B qkv",
        batch=1,
        density=0.5,
        roofline=Roofline(flops_per_s=1e12, bytes_per_s=1e9),
        blocks=BLOCKS,
        capture=TimedGraphs().capture,
        probe=nothing,
        make=make,
        rounds=3,
    )
    return {row.block: row for row in rows}


def test_the_settings_hold_what_ships_and_every_combination_once() -> None:
    settings = grid_settings()
    assert len(settings) == len({setting.name for setting in settings}) == 18
    ships = Setting()
    assert ships in settings
    assert (ships.tile_rows, ships.warps, ships.stages) == (
        kernels.TILE_ROWS,
        kernels.WARPS,
        kernels.STAGES,
    )
    others = schedules_of(settings[0])
    assert {setting.schedule for setting in others} == {"persistent", "split-K"}
    assert {setting.tile_rows for setting in others} == {settings[0].tile_rows}


def test_the_fastest_combination_is_found_and_then_its_fastest_schedule() -> None:
    def time_of(setting: Setting, weights: BlockWeights) -> float:
        time_us = 40.0 if (setting.tile_rows, setting.warps, setting.stages) == (32, 8, 7) else 70.0
        return time_us - 15.0 * (setting.schedule == "split-K" and setting.parts == 4)

    for row in tuned(make_of(time_of)).values():
        assert row.setting == Setting(tile_rows=32, warps=8, stages=7, schedule="split-K", parts=4)
        assert row.tuned_us is not None
        assert row.tuned_us.median == 25.0
        assert row.over_shipped is not None
        assert row.over_shipped.median == SHIPPED_US / 25.0
        assert row.over_dense is not None
        assert row.over_dense.median == DENSE_US / 25.0
        assert row.verdict == "better"
        assert len(row.trials) == 18 + 6


def test_a_setting_that_gains_nothing_leaves_what_ships() -> None:
    for row in tuned(make_of(lambda *_: SHIPPED_US)).values():
        assert row.verdict == "no better than what ships"


def test_the_fastest_block_shape_is_marked_once() -> None:
    rows = tuned(make_of(lambda _, weights: 10.0 + weights.copies[0].block_cols))
    assert [row.is_fastest for row in rows.values()] == [False, True]
    assert "fastest" in tune_line(rows["64x16"])
    assert "fastest" not in tune_line(rows["64x64"])


def test_a_setting_that_is_wrong_or_refused_never_wins_and_its_trial_says_why() -> None:
    def factor(setting: Setting) -> float:
        if setting.warps == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1.1 if setting.stages == 3 else 1.0

    times_us = {3: 1.0, 5: 30.0, 7: 45.0}  # the wrong ones would be fastest
    make = make_of(lambda setting, _: times_us[setting.stages], factor=factor)
    row = tuned(make)["64x64"]
    assert row.setting is not None
    assert (row.setting.warps, row.setting.stages) == (4, 5)
    reasons = {(t.setting.warps, t.setting.stages): t.reason for t in row.trials}
    assert reasons[8, 5] == "RuntimeError: out of resource: shared memory"
    assert reasons[4, 3] == WRONG
    assert reasons[4, 7] is None


def test_where_no_setting_runs_the_row_says_why() -> None:
    def refuse(setting: Setting) -> float:
        raise RuntimeError("no triton here")

    row = tuned(make_of(lambda *_: 1.0, factor=refuse))["64x64"]
    assert (row.setting, row.tuned_us, row.over_shipped) == (None, None, None)
    assert row.verdict == "RuntimeError: no triton here"
    assert row.shipped_us is not None
    assert "no triton here" in tune_line(row)


def test_a_line_of_the_tuning_fits_100_columns_and_shows_the_roofline() -> None:
    row = tuned(make_of(lambda *_: 25.0))["64x64"]
    text = tune_line(row)
    assert max(map(len, text.splitlines())) <= 100
    assert "2.00 (2.00-2.00)" in text
    assert "floor" in text


def test_what_the_tuning_writes_is_read_back_whole() -> None:
    table = TuneTable(
        command="a command", device="none", machine=silent("no NVML"), unfinished=None,
        multiprocessors=2, torch="2",
        dtype="float16", rounds=3, sieve_rounds=7, peak_tflops=1.0, bandwidth_gb_s=1.0,
        rows=tuple(tuned(make_of(lambda *_: 25.0)).values()),
    )  # fmt: skip
    assert msgspec.json.decode(msgspec.json.encode(table), type=TuneTable) == table


def test_every_combination_tried_fits_an_a100_and_an_h100(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hungriest: 128 tokens, 7 stages, blocks of 64. Ampere's limit is 163 KiB a CTA."""
    pytest.importorskip("triton", reason="compiling needs triton")
    monkeypatch.setattr(kernels, "TILE_ROWS", 128)
    monkeypatch.setattr(kernels, "STAGES", 7)
    recipe = kernels.Recipe(block_rows=64, block_cols=64, dtype="float16", epilogue="none")
    for architecture, limit_kib in ((80, 163), (90, 227)):
        found = kernels.compile_ptx(recipe, architecture=architecture)
        assert 0 < found.shared_bytes <= limit_kib * 1024


@pytest.mark.parametrize("architecture", [87, 90])
@pytest.mark.parametrize("name", ["persistent", "split_sum", "add_splits"])
def test_the_schedules_compile_for_a_gpu_without_one(name: str, architecture: int) -> None:
    pytest.importorskip("triton", reason="compiling needs triton")
    from triton import compile as triton_compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cuda_src import candidates

    kernel = getattr(candidates, name)
    constants = {
        "BM": 64, "BN": 64, "BK": 16, "KT": 64, "SPLITS": 4, "EPILOGUE": "gelu", "UPCAST": False,
    }  # fmt: skip
    types = dict.fromkeys(("x", "values", "bias", "residual", "y"), "*fp16")
    types |= dict.fromkeys(("rows", "columns"), "*i32")
    types |= dict.fromkeys(("M", "ldx", "ldy", "block_rows"), "i32") | {"partial": "*fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = set(types) - set(constants) - {"M", "block_rows"}
    source = ASTSource(
        fn=kernel,
        signature={argument: types[argument] for argument in kernel.arg_names},
        constexprs={key: value for key, value in constants.items() if key in kernel.arg_names},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, argument in enumerate(kernel.arg_names)
            if argument in aligned
        },
    )
    with kernels.reproducible_triton():
        made = triton_compile(
            source, target=GPUTarget("cuda", architecture, 32), options={"num_stages": 5}
        )
    matrix = "wgmma" if architecture == 90 else "mma.sync"
    assert (matrix in made.asm["ptx"]) == (name != "add_splits")
    if name != "add_splits":
        assert "cp.async" in made.asm["ptx"]
