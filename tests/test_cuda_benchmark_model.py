"""The whole-model GPU benchmark without a GPU: tiny models on a CPU under graphs that are fakes."""

import sys
import time
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares torch's kernels")
timm = pytest.importorskip("timm", reason="the benchmark builds a timm model")

from benchmarks import gpu_model, gpu_model_entrants  # noqa: E402
from benchmarks.gpu_records import ModelRow  # noqa: E402
from benchmarks.gpu_rounds import WRONG, Spread, nothing  # noqa: E402
from benchmarks.gpu_timing import (  # noqa: E402
    EnergyMeter,
    Roofline,
    energy_meter,
    metered,
    no_meter,
)
from lpvit_edge.errors import MeasurementError  # noqa: E402
from lpvit_profilers.fake_nvml import FakeNvml  # noqa: E402
from lpvit_profilers.nvml import NvmlSource  # noqa: E402
from tests.cuda.fake_graphs import FakeGraphs  # noqa: E402

ROOFLINE = Roofline(flops_per_s=1e12, bytes_per_s=1e9)


def tiny_model() -> Any:
    torch.manual_seed(3)
    made = timm.create_model(
        "deit_tiny_patch16_224", depth=2, embed_dim=128, num_heads=2, img_size=64
    )
    return made.eval().to(torch.bfloat16)


def meter_of(*windows_mj: float) -> EnergyMeter:
    """Each window, the next of these energies."""
    found = iter(windows_mj)
    return EnergyMeter(source="a fake", window_mj=lambda replay: next(found))


def measured_models(
    entrants: dict[str, gpu_model_entrants.Entrant],
    *,
    graphs: FakeGraphs | None = None,
    meter: EnergyMeter | None = None,
) -> dict[str, ModelRow]:
    torch.manual_seed(4)
    dense_model = gpu_model_entrants.entrants(tokens=34)["dense"]
    rows = gpu_model.bench(
        {"dense": dense_model, **entrants},
        torch.randn(2, 3, 64, 64, dtype=torch.bfloat16),
        make=tiny_model,
        tolerance=gpu_model.TOLERANCE["bfloat16"],
        roofline=ROOFLINE,
        meter=meter or no_meter("no counter"),
        capture=(graphs or FakeGraphs(6000.0, 5000.0)).capture,
        probe=nothing,
        rounds=3,
        energy_rounds=2,
    )
    return {row.model: row for row in rows}


def sparse_entrant() -> gpu_model_entrants.Entrant:
    return gpu_model_entrants.entrants(tokens=34)["ours 64x16 d=0.5"]


def test_models_take_turns_for_milliseconds_and_then_for_millijoules_an_image() -> None:
    graphs = FakeGraphs(6000.0, 5000.0)
    # Windows of 20 inferences of 2 images: dense, sparse; then sparse, dense.
    rows = measured_models(
        {"sparse": sparse_entrant()}, graphs=graphs, meter=meter_of(240.0, 120.0, 160.0, 240.0)
    )
    assert graphs.events[:2] == ["capture 0 of 20", "capture 1 of 20"]
    turns = "".join(event.removeprefix("replay ") for event in graphs.events[2:])
    assert turns == "0011" + "1100" + "0011"
    row = rows["sparse"]
    assert (row.rounds_ms, row.reason) == ((5.0,) * 3, None)
    assert row.over_dense == Spread(median=1.2, low=1.2, high=1.2)
    assert row.rounds_mj_per_image == (3.0, 4.0)
    assert row.energy_over_dense == Spread(median=1.75, low=1.625, high=1.875)
    assert row.error is not None
    assert 0 < row.error < 0.05


def test_the_floor_of_a_model_is_that_of_its_linear_layers_at_their_density() -> None:
    row = measured_models({"sparse": sparse_entrant()})["sparse"]
    wide, tokens = 128, 2 * 17  # 16 patches and the class token of two images
    bytes_us = sum(
        2 * (0.5 * out * into + tokens * (out + into)) / ROOFLINE.bytes_per_s * 1e6
        for out, into in ((3 * wide, wide), (wide, wide), (4 * wide, wide), (wide, 4 * wide))
    )
    assert row.floor_ms == pytest.approx(2 * bytes_us / 1e3)  # two blocks, bound by memory


def test_a_model_that_was_not_pruned_as_it_says_gets_neither_time_nor_energy() -> None:
    unpruned = gpu_model_entrants.Entrant(
        change=lambda model: model, prune=sparse_entrant().prune, density=0.5
    )
    rows = measured_models({"unpruned": unpruned}, meter=meter_of(240.0, 240.0))
    row = rows["unpruned"]
    assert (row.latency_ms, row.energy_mj_per_image, row.reason) == (None, None, WRONG)
    assert rows["dense"].rounds_mj_per_image == (6.0, 6.0)


def test_a_time_is_kept_where_there_is_no_energy() -> None:
    row = measured_models({})["dense"]
    assert row.rounds_ms == (6.0,) * 3
    assert (row.energy_mj_per_image, row.reason) == (None, None)
    assert row.energy_reason == "MeasurementError: no counter"


def test_a_machine_without_nvml_has_a_reason_instead_of_energy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with (
        energy_meter(window_s=1.0) as meter,
        pytest.raises(MeasurementError, match="cannot import pynvml"),
    ):
        meter.window_mj(lambda: None)
    assert meter.source == "none"


def test_the_meter_gives_the_millijoules_of_one_replay_by_the_boards_counter() -> None:
    """A counter that a replay moves by 7 mJ: the window opens and closes on its steps."""
    spent_mj = 1_000_000
    nvml = FakeNvml(power=lambda: 100_000, energy=lambda: spent_mj)

    def spend() -> None:
        nonlocal spent_mj
        spent_mj += 7

    def sleep(seconds: float) -> None:
        nvml.sleep(seconds)
        spend()

    source = NvmlSource(library=nvml, sleep=sleep, clock=nvml.clock)
    source.open()
    try:
        with metered(source, window_s=0.02) as meter:
            assert meter.window_mj(spend) == pytest.approx(7.0)
            assert meter.source == source.info.name
            assert meter.notes == set()
    finally:
        source.close()


def test_a_counter_that_stands_still_is_noted_and_power_is_integrated_instead() -> None:
    spent_mj = 1_000_000
    nvml = FakeNvml(instant=lambda: 100_000, energy=lambda: spent_mj)

    def sleep(seconds: float) -> None:
        nonlocal spent_mj
        nvml.sleep(seconds)
        spent_mj += 7  # while the source opens, and never again

    source = NvmlSource(library=nvml, sleep=sleep)
    source.open()
    try:
        with metered(source, window_s=0.3) as meter:
            begin_s = time.monotonic()
            assert 0 < meter.window_mj(lambda: time.sleep(0.01)) < 100_000 * 1.0
            assert time.monotonic() > begin_s
            assert any("stood still" in note for note in meter.notes)
    finally:
        source.close()


def test_the_oracle_of_2_4_keeps_two_of_every_four_weights() -> None:
    model = gpu_model_entrants.halved(tiny_model())
    for linear in gpu_model_entrants.linears(model):
        kept = (linear.weight.view(-1, 4) != 0).sum(1)
        assert int(kept.max()) == 2


@pytest.mark.parametrize("fuses", [True, False])
def test_a_block_sparse_model_computes_what_the_model_with_zeros_computes(fuses: bool) -> None:
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = gpu_model_entrants.block_sparse(
            tiny_model(), block=(64, 16), density=0.5, fuses=fuses
        )(images).float()
        expected = gpu_model_entrants.with_zeros(tiny_model(), block=(64, 16), density=0.5)(
            images
        ).float()
        unpruned = tiny_model()(images).float()
    error = float((found - expected).abs().max())
    # bfloat16 rounds each activation to 2^-8; dense and ours round the GELU's input differently.
    assert error < 0.05 * float(expected.abs().max())
    assert error < 0.2 * float((unpruned - expected).abs().max()), "the pruning must show"


def test_the_unfused_models_leave_gelu_to_torch_as_dense_does() -> None:
    entrants = gpu_model_entrants.entrants(tokens=34)
    kinds = {
        name: entrants[f"{name} 64x16 d=0.5"].change(tiny_model()) for name in ("ours", "unfused")
    }
    for name, gelu in (("ours", "Identity"), ("unfused", "GELU")):
        assert {type(part.mlp.act).__name__ for part in kinds[name].blocks} == {gelu}
    assert len(entrants) == 2 + 2 * 3 * 3
