"""The GPU benchmarks without a GPU: the same paths on CPU tensors, under a timer that is a fake."""

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares torch's kernels")
timm = pytest.importorskip("timm", reason="the benchmark builds a timm model")

from benchmarks import gpu_kernels, gpu_launch, gpu_model  # noqa: E402
from benchmarks.gpu_contestants import Contestant, Problem, dense, ours, problem  # noqa: E402
from benchmarks.gpu_timing import Roofline, energy_mj  # noqa: E402

ROOFLINE = Roofline(flops_per_s=1e12, bytes_per_s=1e9)


def small(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "out_features": 128, "in_features": 256, "tokens": 20, "dtype": "float16", "copies": 2,
        "device": "cpu",
    }  # fmt: skip
    return problem(**(given | changes))


def measured(given: Problem, enter: Any, *, times: list[int] | None = None) -> gpu_kernels.Row:
    def timer(run: Any, *, copies: int) -> float:
        for i in range(copies):
            run(i)
        if times is not None:
            times.append(copies)
        return 50.0

    return gpu_kernels.measure(
        "a kernel", enter, given, layer="B qkv", batch=1, roofline=ROOFLINE, timer=timer
    )


@pytest.mark.parametrize("block", gpu_kernels.BLOCKS)
@pytest.mark.parametrize("density", [0.5, 0.3])
def test_our_contestant_is_right_and_gets_a_time(block: tuple[int, int], density: float) -> None:
    times: list[int] = []
    row = measured(small(), lambda given: ours(given, block=block, density=density), times=times)
    assert (row.time_us, row.reason, row.density) == (50.0, None, density)
    assert times == [2]


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    row = measured(small(), dense)
    moved = 2 * (128 * 256 + 20 * 256 + 20 * 128)
    assert row.floor_us == pytest.approx(1e6 * moved / 1e9)
    assert ROOFLINE.floor_us(macs=1e9, moved_bytes=1.0) == pytest.approx(2000.0)


def test_a_wrong_result_gets_no_time() -> None:
    def broken(given: Problem) -> Contestant:
        right = dense(given)
        return Contestant(
            run=lambda i: right.run(i) * 1.1,
            expected=right.expected,
            density=1.0,
            weight_bytes=right.weight_bytes,
        )

    row = measured(small(), broken)
    assert row.time_us is None
    assert row.reason == "the result is wrong"


def test_a_library_that_refuses_a_layer_is_reported_not_dropped() -> None:
    def refuse(given: Problem) -> Contestant:
        raise RuntimeError("not on this device\nand a page of context")

    row = measured(small(), refuse)
    assert row.reason == "RuntimeError: not on this device"
    assert "-- RuntimeError: not on this device" in gpu_kernels.line(row, dense_us=10.0)


def test_a_refusal_without_a_text_is_reported_by_its_name() -> None:
    def refuse(given: Problem) -> Contestant:
        raise AssertionError

    assert measured(small(), refuse).reason == "AssertionError"


@pytest.mark.parametrize("width", gpu_kernels.WIDTHS.values())
@pytest.mark.parametrize("factors", gpu_kernels.LAYERS.values())
def test_no_contestants_weights_fit_the_cache(width: int, factors: tuple[int, int]) -> None:
    out_features, in_features = (factor * width for factor in factors)
    copies = gpu_kernels.copies_of(out_features, in_features)
    kept_bytes = 2 * out_features * in_features * min(gpu_kernels.DENSITIES) * copies
    assert kept_bytes >= 3 * 50 * 2**20, "an H100's L2 cache holds 50 MiB"


def test_a_machine_without_nvml_has_a_reason_instead_of_energy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    graph: Any = None  # no replay may happen
    assert "cannot import pynvml" in str(energy_mj(graph))


def test_every_layer_meets_every_contestant() -> None:
    names = [name for name, _ in gpu_kernels.entrants()]
    assert len(names) == len(set(names)) == 2 + 2 * (3 + 6)
    assert names[0] == "dense cuBLAS"


def tiny_model() -> Any:
    torch.manual_seed(3)
    made = timm.create_model(
        "deit_tiny_patch16_224", depth=2, embed_dim=128, num_heads=2, img_size=64
    )
    return made.eval().to(torch.bfloat16)


def measured_model(entrant: gpu_model.Entrant, *, energy: float | str = 6.0) -> gpu_model.Row:
    torch.manual_seed(4)
    return gpu_model.measure(
        "a model",
        entrant,
        torch.randn(2, 3, 64, 64, dtype=torch.bfloat16),
        make=tiny_model,
        tolerance=gpu_model.TOLERANCE["bfloat16"],
        roofline=ROOFLINE,
        timer=lambda run, copies: 5000.0,
        energy=lambda run: energy,
    )


def test_a_right_model_gets_milliseconds_and_millijoules_an_image() -> None:
    row = measured_model(gpu_model.entrants()["ours 64x16 d=0.5"])
    assert (row.latency_ms, row.energy_mj_per_image, row.reason) == (5.0, 3.0, None)
    assert row.error is not None
    assert 0 < row.error < 0.05


def test_the_floor_of_a_model_is_that_of_its_linear_layers_at_their_density() -> None:
    row = measured_model(gpu_model.entrants()["ours 64x16 d=0.5"])
    wide, tokens = 128, 2 * 17  # 16 patches and the class token of two images
    bytes_us = sum(
        2 * (0.5 * out * into + tokens * (out + into)) / ROOFLINE.bytes_per_s * 1e6
        for out, into in ((3 * wide, wide), (wide, wide), (4 * wide, wide), (wide, 4 * wide))
    )
    assert row.floor_ms == pytest.approx(2 * bytes_us / 1e3)  # two blocks, bound by memory
    assert "floor" in gpu_model.line(row, dense=row)


def test_a_model_that_was_not_pruned_as_it_says_gets_no_time() -> None:
    prune = gpu_model.entrants()["ours 64x16 d=0.5"].prune
    row = measured_model(gpu_model.Entrant(change=lambda model: model, prune=prune, density=0.5))
    assert (row.latency_ms, row.energy_mj_per_image) == (None, None)
    assert row.reason == "the result is wrong"


def test_a_time_is_kept_where_there_is_no_energy() -> None:
    row = measured_model(gpu_model.entrants()["dense"], energy="no counter")
    assert (row.latency_ms, row.energy_mj_per_image, row.reason) == (5.0, None, "no counter")


def test_the_oracle_of_2_4_keeps_two_of_every_four_weights() -> None:
    model = gpu_model.halved(tiny_model())
    for linear in gpu_model.linears(model):
        kept = (linear.weight.view(-1, 4) != 0).sum(1)
        assert int(kept.max()) == 2


def test_a_block_sparse_model_computes_what_the_model_with_zeros_computes() -> None:
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = gpu_model.block_sparse(tiny_model(), block=(64, 16), density=0.5)(images).float()
        expected = gpu_model.with_zeros(tiny_model(), block=(64, 16), density=0.5)(images).float()
        unpruned = tiny_model()(images).float()
    error = float((found - expected).abs().max())
    # bfloat16 rounds each activation to 2^-8; dense and ours round the GELU's input differently.
    assert error < 0.05 * float(expected.abs().max())
    assert error < 0.2 * float((unpruned - expected).abs().max()), "the pruning must show"


def test_the_launch_benchmark_writes_what_it_measured_and_how(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "launch.json"
    monkeypatch.setattr(sys, "argv", ["x", "--rounds", "3", "--launches", "5", "--out", str(out)])
    assert gpu_launch.main() == 0
    found = msgspec.json.decode(out.read_bytes(), type=gpu_launch.LaunchTime)
    assert (found.rounds, found.launches) == (3, 5)
    assert found.command == f"python -m benchmarks.gpu_launch {' '.join(sys.argv[1:])}"
    assert 0 < found.range_us[0] <= found.median_us <= found.range_us[1]


def test_the_record_of_launches_holds_the_median_the_quartiles_and_the_extremes() -> None:
    found = gpu_launch.record_of([5.0, 1.0, 3.0, 2.0, 4.0], launches=7, command="a command")
    assert (found.median_us, found.quartiles_us, found.range_us) == (3.0, (1.5, 4.5), (1.0, 5.0))


def test_the_committed_launch_time_is_a_record_of_this_benchmark_and_below_its_goal() -> None:
    path = Path(gpu_launch.__file__).parent / "results/gpu_launch.json"
    found = msgspec.json.decode(path.read_bytes(), type=gpu_launch.LaunchTime)
    assert (found.rounds, found.launches) == (gpu_launch.ROUNDS, gpu_launch.LAUNCHES)
    assert found.median_us < found.goal_us == gpu_launch.GOAL_US
