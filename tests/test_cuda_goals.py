"""Whether rows of the GPU benchmarks meet the goals, and how they look on a terminal."""

import msgspec

from benchmarks.gpu_goals import kernel_goals, model_goals
from benchmarks.gpu_records import KernelRow, ModelRow
from benchmarks.gpu_rounds import Spread
from benchmarks.gpu_tables import KERNEL_HEAD, goal_line, kernel_line, model_lines


def row(kernel: str = "ours 64x64 d=0.5", **changes: object) -> KernelRow:
    given: dict[str, object] = {
        "layer": "B fc1", "batch": 8, "kernel": kernel, "density": 0.5,
        "time_us": Spread(median=41.23, low=40.91, high=41.8),
        "over_dense": Spread(median=1.43, low=1.4, high=1.45),
        "over_bsr": Spread(median=2.0, low=1.9, high=2.1), "bsr_peer": "torch bsr 64x64 d=0.5",
        "floor_us": 30.0, "error": 3e-4, "copies": 7, "rounds_us": (1.0, 2.0), "reason": None,
    }  # fmt: skip
    return KernelRow(**(given | changes))  # type: ignore[arg-type]


def test_a_line_shows_time_and_gains_with_quartiles_the_floor_and_the_error_in_100_columns() -> (
    None
):
    text = kernel_line(row())
    for part in ("41.2 (40.9-41.8)", "1.43 (1.40-1.45)", "2.00 (1.90-2.10)", "30.0  73%", "3e-04"):
        assert part in text
    assert max(len(text), len(KERNEL_HEAD)) <= 100


def test_a_line_without_a_time_says_why() -> None:
    text = kernel_line(row(time_us=None, over_dense=None, reason="RuntimeError: not here"))
    assert text.endswith("-- RuntimeError: not here")


def test_a_line_without_a_peer_says_so_and_keeps_its_time() -> None:
    text = kernel_line(row(over_bsr=None))
    assert "41.2 (40.9-41.8)" in text
    assert " -- " in text


def wide(
    gain: float, *, low: float | None = None, kernel: str, layer: str, batch: int
) -> KernelRow:
    found = Spread(median=gain, low=gain if low is None else low, high=gain)
    return row(kernel, layer=layer, batch=batch, over_dense=found)


def half_rows(gains: dict[str, float]) -> list[KernelRow]:
    """All that the first goal asks for, high where nothing else is said."""
    filled = {"B qkv": 9.0, "B fc1": 9.0, "B fc2": 9.0} | gains
    return [
        wide(filled[layer], kernel="ours 64x64 d=0.5", layer=layer, batch=batch)
        for layer in filled
        for batch in (8, 32)
    ]


def test_a_goal_over_layers_is_decided_by_the_layer_that_gains_least() -> None:
    gains = {"B qkv": 1.6, "B fc1": 1.2, "B fc2": 1.5, "B proj": 0.5}
    goal = kernel_goals(half_rows(gains))[0]
    assert (goal.verdict, goal.where) == ("missed", "B fc1 batch 8 ours 64x64 d=0.5")
    assert kernel_goals(half_rows(gains | {"B fc1": 1.3}))[0].verdict == "met"


def test_the_better_of_the_two_wide_blocks_counts_on_every_layer() -> None:
    rows = half_rows({"B fc1": 1.2})
    rows += [wide(1.4, kernel="ours 64x32 d=0.5", layer="B fc1", batch=b) for b in (8, 32)]
    goal = kernel_goals(rows)[0]
    assert (goal.verdict, goal.where) == ("met", "B fc1 batch 8 ours 64x32 d=0.5")
    assert "1.40 (1.40-1.40) at B fc1 batch 8" in goal_line(goal)


def test_batch_1_and_narrow_blocks_decide_no_goal() -> None:
    rows = half_rows({"B fc1": 1.4})
    rows.append(wide(0.3, kernel="ours 64x64 d=0.5", layer="B fc1", batch=1))
    rows.append(wide(9.0, kernel="ours 16x16 d=0.5", layer="B fc1", batch=8))
    found = kernel_goals(rows)[0].found
    assert found is not None
    assert found.median == 1.4


def test_a_goal_that_only_the_median_meets_says_so() -> None:
    rows = [row for row in half_rows({}) if row.layer != "B fc1"]
    rows += [
        wide(1.31, low=1.2, kernel="ours 64x64 d=0.5", layer="B fc1", batch=b) for b in (8, 32)
    ]
    assert kernel_goals(rows)[0].verdict == "met by the median, not by the lower quartile"


def test_a_goal_with_a_layer_that_was_not_measured_is_not_met() -> None:
    rows = half_rows({"B fc1": 1.4})
    rows.append(row(layer="B fc2", over_dense=None, time_us=None, reason="no"))
    goal = kernel_goals(rows)[0]
    assert (goal.verdict, goal.found) == ("not measured", None)
    assert "B fc2" in str(goal.where)
    assert kernel_goals([])[0].verdict == "not measured"


def model_row(**changes: object) -> ModelRow:
    given: dict[str, object] = {
        "model": "ours 64x64 d=0.3", "batch": 32,
        "latency_ms": Spread(median=9.123, low=9.1, high=9.2),
        "over_dense": Spread(median=1.8, low=1.7, high=1.9), "floor_ms": 3.0,
        "energy_mj_per_image": Spread(median=61.5, low=60.0, high=62.0),
        "energy_over_dense": Spread(median=1.3, low=1.2, high=1.4), "error": 1e-3,
        "rounds_ms": (9.0, 9.2), "rounds_mj_per_image": (61.0, 62.0), "reason": None,
        "energy_reason": None,
    }  # fmt: skip
    return ModelRow(**(given | changes))  # type: ignore[arg-type]


def test_a_models_lines_show_time_energy_and_both_gains_with_their_spread() -> None:
    text = model_lines(model_row())
    for part in ("9.123 (9.100-9.200) ms", "1.80 (1.70-1.90)", "3.000  33%", "1e-03",
                 "61.5 (60.0-62.0) mJ", "1.30 (1.20-1.40)"):  # fmt: skip
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_model_without_energy_keeps_its_time_and_says_why() -> None:
    text = model_lines(model_row(energy_mj_per_image=None, energy_reason="no counter"))
    assert "9.123 (9.100-9.200) ms" in text
    assert "-- no counter" in text
    assert "-- no GPU" in model_lines(model_row(latency_ms=None, reason="no GPU"))


def test_a_goal_for_batches_8_to_32_needs_both_and_all_layers_of_deit_b() -> None:
    rows = half_rows({})
    assert kernel_goals(rows)[0].verdict == "met"
    for layer, batch in (("B fc1", 32), ("B qkv", 8)):
        some = [row for row in rows if (row.layer, row.batch) != (layer, batch)]
        goal = kernel_goals(some)[0]
        assert (goal.verdict, goal.where) == ("not measured", f"{layer} batch {batch}")
    of_small = [msgspec.structs.replace(r, layer=r.layer.replace("B", "S")) for r in rows]
    assert kernel_goals(of_small)[0].verdict == "not measured"


def gained(median: float, low: float) -> Spread:
    return Spread(median=median, low=low, high=median)


def test_a_whole_model_only_reaches_a_goal_subject_to_its_accuracy() -> None:
    rows = [
        model_row(batch=batch, over_dense=gained(gain, gain))
        for batch, gain in ((1, 1.0), (8, 1.9), (32, 1.8))
    ]
    time, unfused, energy = model_goals([*rows, model_row(model="2:4", over_dense=None)])
    assert time.verdict == "met, if accuracy holds there"
    assert time.where == "ours 64x64 d=0.3 batch 32"
    assert energy.verdict == "missed"
    assert unfused.verdict == model_goals([])[0].verdict == "not measured"
    assert model_goals(rows[:2])[0].verdict == "not measured", "batch 32 is asked for"


def test_the_best_model_is_taken_and_decided_by_its_lower_quartile() -> None:
    """The best of many medians is partly lucky."""
    rows = [
        model_row(model=name, batch=batch, over_dense=found)
        for name, found in (("ours lucky", gained(1.95, 1.5)), ("ours steady", gained(1.85, 1.75)))
        for batch in (8, 32)
    ]
    time = model_goals(rows)[0]
    assert time.where == "ours steady batch 8"
    assert time.verdict == "met by the median, not by the lower quartile, if accuracy holds there"
