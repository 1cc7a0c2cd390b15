"""Allocation: exact, within every constraint, and plain about what cannot be reached."""

from collections.abc import Mapping
from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")

from lpvit_edge.allocate import allocate
from lpvit_edge.budget import amount
from lpvit_edge.errors import BudgetNotMetError, MeasurementError, UnknownOptionError
from lpvit_edge.knapsack import Constraint, by_milp, by_slope, by_uniform, distortion, least
from lpvit_edge.layer_options import Option, Options, Picks, interpolated_latency, layer_options
from lpvit_edge.network_cost import dense_totals
from lpvit_edge.records import Allocation, DeviceProfile, PowerNote
from tests.device_records import GRID, curves, gemm, profile


def option(pattern: str, sparsity: float, cost: float, distortion: float) -> Option:
    return Option(
        pattern=pattern,
        sparsity=sparsity,
        latency_ms=cost,
        energy_mj=None,
        macs=0.0,
        weight_bytes=0.0,
        distortion=distortion,
    )


def layer(*pairs: tuple[float, float]) -> tuple[Option, ...]:
    """Dense at 1 ms, then 64x1 at rising sparsity with (latency, distortion)."""
    sparse = (option("64x1", 0.25 * (i + 1), ms, d) for i, (ms, d) in enumerate(pairs))
    return option("dense", 0.0, 1.0, 0.0), *sparse


OPTIONS: Options = (
    layer((0.8, 0.1), (0.5, 0.9), (0.3, 4.0)),
    layer((0.9, 0.3), (0.6, 0.5), (0.2, 0.8)),
    layer((0.7, 2.0), (0.4, 2.5)),
)


def within(options: Options, budget_ms: float) -> list[Constraint]:
    costs = tuple(tuple(o.latency_ms for o in opts) for opts in options)
    return [Constraint(name="latency_ms", costs=costs, limit=budget_ms)]


def total(picks: Picks) -> tuple[float, float]:
    return within(OPTIONS, 0.0)[0].total(picks), distortion(OPTIONS, picks)


def every(options: Options) -> list[Picks]:
    return list(product(*(range(len(opts)) for opts in options)))


@pytest.mark.parametrize("budget_ms", [3.0, 2.5, 2.0, 1.7, 1.3, 0.9])
def test_milp_finds_the_optimum_of_an_exhaustive_search(budget_ms: float) -> None:
    best = min(d for ms, d in map(total, every(OPTIONS)) if ms <= budget_ms + 1e-9)
    latency_ms, found = total(by_milp(OPTIONS, within(OPTIONS, budget_ms)))
    assert latency_ms <= budget_ms + 1e-6
    assert found == pytest.approx(best)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Options, list[Constraint]]:
    """Up to 4 layers, 4 options and 3 constraints, some costs negative, distortions of 12 decades.

    Costs and limits are whole numbers, so that no sum lies within the solver's tolerance.
    """
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    numbers = st.integers(-20, 100)
    exponents = st.integers(-9, 3)
    options = tuple(
        tuple(
            option(
                "64x1" if index else "dense",
                0.25 * index,
                float(draw(numbers)),
                0.0 if index == 0 else draw(st.integers(1, 9)) * 10.0 ** draw(exponents),
            )
            for index in range(count)
        )
        for count in counts
    )
    built = []
    for number in range(draw(st.integers(1, 3))):
        costs = tuple(tuple(float(draw(numbers)) for _ in range(count)) for count in counts)
        limit = float(draw(st.integers(-20, 100 * len(counts))))
        built.append(Constraint(name=str(number), costs=costs, limit=limit))
    return options, built


def test_milp_tells_a_tiny_distortion_from_none_beside_a_huge_one() -> None:
    options = (tuple(option("64x1", 0.25, 0.0, d) for d in (0.0, 1e3, 1.0, 1e-9)),)
    assert by_milp(options, [Constraint(name="0", costs=((0.0,) * 4,), limit=0.0)]) == (0,)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_milp_equals_brute_force_under_any_constraints(
    problem: tuple[Options, list[Constraint]],
) -> None:
    options, built = problem
    kept = [p for p in every(options) if all(c.holds(p) for c in built)]
    if not kept:
        with pytest.raises(BudgetNotMetError, match="no allocation keeps every constraint"):
            by_milp(options, built)
        return
    best = min(distortion(options, picks) for picks in kept)
    picks = by_milp(options, built)
    assert all(constraint.holds(picks) for constraint in built)
    assert distortion(options, picks) == pytest.approx(best, rel=1e-5, abs=1e-14)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_the_baselines_keep_every_constraint_or_refuse_and_never_beat_milp(
    problem: tuple[Options, list[Constraint]],
) -> None:
    options, built = problem
    for baseline in (by_slope, by_uniform):
        try:
            picks = baseline(options, built)
        except BudgetNotMetError:
            continue
        assert all(constraint.holds(picks) for constraint in built)
        exact = distortion(options, by_milp(options, built))
        # Both may lie within the solver's tolerance of the largest distortion.
        largest = max(option.distortion for opts in options for option in opts)
        assert distortion(options, picks) >= exact * (1 - 1e-5) - 1e-9 * largest


def test_a_distortion_a_billion_times_smaller_than_the_largest_is_still_told_apart() -> None:
    layers = (layer((0.5, 3e-9), (0.4, 1e3)), layer((0.5, 2e-9), (0.4, 1e3)))
    assert by_milp(layers, within(layers, 1.5)) == (0, 1)


def test_nothing_is_found_where_nothing_fits() -> None:
    assert least(((1.0, 2.0),), [Constraint(name="x", costs=((3.0, 4.0),), limit=2.0)]) is None


@pytest.mark.parametrize("budget_ms", [3.0, 2.0, 1.3, 0.9])
def test_one_slope_for_all_layers_fits_the_budget_and_never_beats_milp(budget_ms: float) -> None:
    latency_ms, found = total(by_slope(OPTIONS, within(OPTIONS, budget_ms)))
    assert latency_ms <= budget_ms + 1e-6
    assert found >= total(by_milp(OPTIONS, within(OPTIONS, budget_ms)))[1] - 1e-9


def test_uniform_takes_the_lowest_sparsity_that_fits_or_says_that_none_does() -> None:
    options = (layer((0.8, 0.1), (0.5, 0.9)), layer((0.9, 0.3), (0.6, 0.5)))
    assert by_uniform(options, within(options, 1.2)) == (2, 2)
    assert by_uniform(options, within(options, 2.0)) == (0, 0)
    with pytest.raises(BudgetNotMetError, match="no uniform sparsity"):
        by_uniform(options, within(options, 0.5))


def test_uniform_stays_dense_where_no_pattern_gains_and_dense_fits() -> None:
    options = (layer(), layer())
    assert by_uniform(options, within(options, 2.0)) == (0, 0)
    with pytest.raises(BudgetNotMetError, match="no uniform sparsity"):
        by_uniform(options, within(options, 1.9))


def test_latency_between_measured_points_never_rises_with_sparsity() -> None:
    gemms = [
        msgspec.structs.replace(gemm(64, "64x1", sparsity, watts=None), latency_ms=ms)
        for sparsity, ms in ((0.4, 0.5), (0.2, 0.8), (0.6, 0.55), (0.8, 0.1))
    ]
    latency_at = interpolated_latency(gemms)
    assert latency_at(0.2) == pytest.approx(0.8)
    assert latency_at(0.3) == pytest.approx((0.8 + 0.525) / 2)
    assert latency_at(0.4) == latency_at(0.6) == pytest.approx(0.525)  # 0.5 and 0.55 as one
    assert latency_at(0.8) == pytest.approx(0.1)
    assert latency_at(0.1) == float("inf")  # below what was measured nothing is promised


def chosen(budget: Mapping[str, float], *, allocator: str = "milp") -> Allocation:
    return allocate(profile(), curves(), budget=budget, allocator=allocator)


# Dense: 7 ms, 40 mJ, 5714 mW, 245760 MACs, 99304 bytes.
EVERY = {"latency_ms": 4.5, "energy_mj": 33.0, "macs": 140_000.0, "weight_bytes": 70_000.0}


@pytest.mark.parametrize("allocator", ["milp", "slope", "uniform"])
def test_every_allocator_keeps_latency_energy_macs_and_bytes_together(allocator: str) -> None:
    found = chosen(EVERY, allocator=allocator)
    assert found.predicted_latency_ms <= EVERY["latency_ms"]
    assert found.predicted_energy_mj is not None
    assert found.predicted_energy_mj <= EVERY["energy_mj"]
    assert found.macs is not None
    assert found.macs <= EVERY["macs"]
    assert found.predicted_weight_bytes is not None
    assert found.predicted_weight_bytes <= EVERY["weight_bytes"]
    assert found.distortion >= chosen(EVERY).distortion * (1 - 1e-9)


def test_mean_power_is_kept_by_choosing_the_pattern_that_draws_less() -> None:
    # 64x1 saves the most time at 8 W, 32x32 less at 5 W.
    free = chosen({"latency_ms": 5.5})
    assert {c.pattern for c in free.choices} == {"dense", "64x1"}
    assert free.predicted_power_mw is not None
    assert free.predicted_power_mw > 5400.0
    kept = chosen({"latency_ms": 5.5, "power_mw": 5400.0})
    assert kept.predicted_power_mw is not None
    assert kept.predicted_power_mw <= 5400.0 + 1e-3
    assert "32x32" in {c.pattern for c in kept.choices}
    assert set(kept.bound) == {"latency_ms", "power_mw"}


def test_only_the_constraint_that_forces_the_distortion_binds() -> None:
    assert chosen({"latency_ms": 4.0, "macs": 240_000.0}).bound == ("latency_ms",)
    assert chosen({"latency_ms": 7.0}).bound == ()
    alike = chosen({"latency_ms": 4.0, "macs": chosen({"latency_ms": 4.0}).macs or 0.0})
    assert set(alike.bound) == {"latency_ms", "macs"}


def test_a_form_that_is_not_faster_than_dense_is_never_chosen() -> None:
    slow = [
        msgspec.structs.replace(g, latency_ms=5.0) if g.pattern == "64x1" else g
        for g in profile().gemms
    ]
    measured = msgspec.structs.replace(profile(), gemms=tuple(slow))
    found = allocate(measured, curves(), budget={"macs": 120_000.0})
    assert {c.pattern for c in found.choices} <= {"dense", "32x32"}


def test_what_cannot_be_reached_is_named_with_the_best_that_can() -> None:
    with pytest.raises(BudgetNotMetError) as caught:
        chosen({"latency_ms": 1.0, "weight_bytes": 1e5})
    # All layers at 80 % in 64x1: 1 + 6 * 0.2 ms.
    assert str(caught.value) == (
        "no allocation reaches 1.000 ms of latency: 2.200 ms is the best that is reachable on this "
        "device (dense 7.000 ms); raise --target-latency to 0.32x or more; or try other --patterns"
    )
    with pytest.raises(
        BudgetNotMetError, match=r"4.783 W is the best .* --max-power to 4.79W or more"
    ):
        chosen({"power_mw": 3000.0})


def test_limits_that_exclude_each_other_are_named_with_the_best_of_each() -> None:
    # Fast means 64x1 at 8 W; little power means slow.
    budget = {"latency_ms": 3.0, "power_mw": 5000.0}
    chosen({"latency_ms": 3.0})
    chosen({"power_mw": 5000.0})
    with pytest.raises(
        BudgetNotMetError, match="together, though each alone can be kept"
    ) as caught:
        chosen(budget)
    text = str(caught.value)
    best_ms = float(text.split("--target-latency ")[1].split(" ms")[0])
    best_w = float(text.split("--max-power ")[1].split(" W")[0])
    assert best_ms > 3.0
    assert best_w > 5.0
    assert chosen({**budget, "latency_ms": best_ms + 1e-3}).predicted_latency_ms <= best_ms + 1e-3
    chosen({**budget, "power_mw": 1000 * best_w + 1.0})


@pytest.mark.parametrize("key", ["energy_mj", "power_mw"])
def test_energy_is_not_limited_where_none_was_measured(key: str) -> None:
    none = profile(quality="unavailable", reason="no power sensor")
    with pytest.raises(MeasurementError, match=r"are unavailable \(no power sensor\)"):
        allocate(none, curves(), budget={key: 10.0})
    doubtful = profile(quality="suspect", reason="a rail above its total")
    with pytest.raises(MeasurementError, match=r"are suspect \(a rail above its total\)"):
        allocate(doubtful, curves(), budget={key: 10.0}, allow_estimated=True)
    silent = msgspec.structs.replace(profile(), rest_energy_mj=None)
    with pytest.raises(MeasurementError, match="no energy of the rest of the network"):
        allocate(silent, curves(), budget={key: 10.0})


@pytest.mark.parametrize("key", ["energy_mj", "power_mw"])
@pytest.mark.parametrize(
    ("engine", "scope", "part"),
    [("openvino", "gpu_board", "CPU"), ("tensorrt", "cpu_package", "GPU")],
)
def test_energies_of_a_part_that_does_not_work_limit_nothing(
    key: str, engine: str, scope: str, part: str
) -> None:
    def measured(scope: str) -> DeviceProfile:
        power = PowerNote(source="x", scope=scope, quality="measured", reason=None)
        return msgspec.structs.replace(profile(), engine=engine, power=power)

    limit = {"energy_mj": 33.0, "power_mw": 6500.0}[key]
    with pytest.raises(MeasurementError, match=f"{scope} .x., which does not cover the {part}, "):
        allocate(measured(scope), curves(), budget={key: limit}, allow_estimated=True)
    assert allocate(measured("module_input"), curves(), budget={key: limit}).budget == {key: limit}
    assert allocate(measured(scope), curves(), budget={"latency_ms": 4.0}).choices


def test_energy_is_interpolated_between_the_forms_that_have_one() -> None:
    whole = profile()
    silenced = tuple(
        msgspec.structs.replace(g, energy_mj=None) if g.sparsity in silent else g
        for silent in ((GRID[1], GRID[-1]),)
        for g in whole.gemms
    )
    holed = msgspec.structs.replace(whole, gemms=silenced)

    def energies(device: DeviceProfile) -> dict[float, float | None]:
        options = layer_options(device, curves(), criterion="hessian", patterns=("64x1",))
        return {o.sparsity: o.energy_mj for o in options[0] if o.pattern == "64x1"}

    # fc1 draws 16 mJ times its density, so the missing point lies on the line through the others
    known = energies(holed)
    assert known[GRID[1]] == pytest.approx(energies(whole)[GRID[1]])
    assert known[GRID[2]] is not None
    assert known[GRID[-1]] is None
    assert known[0.7] is None  # above the highest that has one
    found = allocate(holed, curves(), budget={"energy_mj": 33.0})
    assert found.predicted_energy_mj is not None
    assert found.predicted_energy_mj <= 33.0


def test_estimated_energies_count_only_when_asked_and_are_marked() -> None:
    estimated = profile(quality="estimated")
    with pytest.raises(MeasurementError, match="--allow-estimated-energy"):
        allocate(estimated, curves(), budget={"energy_mj": 33.0})
    found = allocate(estimated, curves(), budget={"energy_mj": 33.0}, allow_estimated=True)
    assert found.energy_quality == "estimated"


def test_without_energies_the_other_limits_still_work() -> None:
    found = allocate(profile(quality="unavailable"), curves(), budget={"latency_ms": 4.0})
    assert found.predicted_latency_ms <= 4.0
    assert (found.predicted_energy_mj, found.predicted_power_mw) == (None, None)


def test_a_layer_that_takes_longer_in_the_network_takes_more_energy_at_the_same_power() -> None:
    slower = msgspec.structs.replace(profile(), factors={"dense": 1.25, "64x1": 0.8})
    totals = dense_totals(slower)
    assert totals["energy_mj"] == pytest.approx(1.25 * 36.0 + 4.0)
    assert totals["power_mw"] == pytest.approx(1000.0 * (1.25 * 36.0 + 4.0) / (1.25 * 6.0 + 1.0))
    options = layer_options(slower, curves(), criterion="hessian", patterns=("64x1",))
    for option in options[0]:
        assert option.energy_mj is not None
        watts = 6.0 if option.pattern == "dense" else 8.0
        assert option.energy_mj / option.latency_ms == pytest.approx(watts)


def test_dense_totals_are_what_shares_are_shares_of() -> None:
    totals = dense_totals(profile())
    assert totals["latency_ms"] == 7.0
    assert totals["energy_mj"] == pytest.approx(6 * 6.0 + 4.0)
    assert totals["power_mw"] == pytest.approx(40_000 / 7)
    assert totals["macs"] == 10 * 64 * (128 + 64) * 2
    assert totals["weight_bytes"] == 1000 + 4 * 64 * (128 + 64) * 2
    assert dense_totals(profile(quality="unavailable"))["energy_mj"] is None


def test_bytes_of_a_sparse_form_are_those_of_the_stored_arrays() -> None:
    from lpvit_edge.layer_options import weight_bytes
    from lpvit_engines.block_sparse import BlockSparseMatrix
    from tests.device_records import LAYERS

    weight = np.zeros((128, 64), np.float32)
    weight[:64, :10] = 1.0
    weight[64:, 3:19] = 1.0  # 26 of 128 columns of 64 are kept
    stored = BlockSparseMatrix.from_dense(weight, block_rows=64, block_cols=1)
    arrays = (stored.values, stored.row_ptr, stored.col_idx)
    assert weight_bytes(LAYERS[0], "64x1", 1 - 26 / 128) == sum(a.nbytes for a in arrays)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("0.5x", "latency_ms", 10.0),
        ("12ms", "latency_ms", 12.0),
        (".25x", "latency_ms", 5.0),
        ("0.012s", "latency_ms", 12.0),
        ("40mJ", "energy_mj", 40.0),
        ("0.04J", "energy_mj", 40.0),
        ("12W", "power_mw", 12_000.0),
        ("900M", "macs", 9e8),
        ("20MB", "weight_bytes", 2e7),
    ],
)
def test_a_budget_is_a_share_or_an_amount(text: str, key: str, value: float) -> None:
    assert amount(text, key, dense=20.0) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "fast", "0x", "-1ms", "5", "1e3ms", "nanx", "5mJ", "3W"])
def test_a_budget_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(UnknownOptionError, match=r"--target-latency .* is no latency budget"):
        amount(text, "latency_ms", dense=20.0)


def test_a_share_needs_a_dense_value_and_power_has_none() -> None:
    with pytest.raises(UnknownOptionError, match="write 12W or 12mW"):
        amount("0.5x", "power_mw", dense=9.0)
    with pytest.raises(UnknownOptionError, match="not known to this profile; write 12mJ or 12J"):
        amount("0.5x", "energy_mj", dense=None)
