"""Whole networks: which are timed, the factors they give, and what is predicted with them."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lpvit_edge import whole_networks
from lpvit_edge.layer_options import costs_in_network
from lpvit_edge.prediction import layer_latency, measured_sparsities, predicted_ms
from lpvit_edge.records import GemmCost
from lpvit_edge.whole_networks import (
    emptied_forms,
    energy_sum,
    fitted_factors,
    measure_networks,
    mixed_forms,
    pattern_forms,
    rest_energy_mj,
)
from tests.device_records import GRID, LAYERS, REST_MJ, REST_MS, gemm, profile

PROFILE = profile()
GEMMS = (
    *PROFILE.gemms,
    *(gemm(out, pattern, 1.0, watts=5.0) for out in (128, 64) for pattern in ("64x1", "32x32")),
)
# What the layers of each pattern take inside a network, over what they take alone.
TRUE = {"dense": 1.1, "64x1": 1.25, "32x32": 0.9}
NETWORKS = {
    "emptied": emptied_forms(LAYERS, ("64x1", "32x32")),
    **{pattern: pattern_forms(LAYERS, GEMMS, pattern) for pattern in ("64x1", "32x32")},
}


def inside_ms(forms: dict[str, tuple[str, float]]) -> float:
    """A device on which the factors are exactly TRUE."""
    alone = layer_latency(GEMMS)
    chosen = [(layer, forms.get(layer.name, ("dense", 0.0))) for layer in LAYERS]
    return REST_MS + sum(TRUE[form[0]] * alone(layer, *form) for layer, form in chosen)


def test_the_factors_are_what_layers_take_inside_a_network_over_alone() -> None:
    latency_ms = {"dense": inside_ms({}), **{n: inside_ms(f) for n, f in NETWORKS.items()}}
    found = fitted_factors(latency_ms, NETWORKS, LAYERS, GEMMS, rest_ms=REST_MS)
    assert found == pytest.approx(TRUE)


def test_layers_that_a_pattern_does_not_divide_count_as_the_dense_ones_they_stay() -> None:
    half = {name: form for name, form in NETWORKS["64x1"].items() if name.startswith("blocks.0")}
    latency_ms = {"dense": inside_ms({}), "64x1": inside_ms(half)}
    found = fitted_factors(latency_ms, {"64x1": half}, LAYERS, GEMMS, rest_ms=REST_MS)
    assert found == pytest.approx({"dense": TRUE["dense"], "64x1": TRUE["64x1"]})


def test_a_pattern_that_drowned_in_the_scatter_has_no_factor() -> None:
    latency_ms = {"dense": inside_ms({}), "64x1": REST_MS - 0.1}
    found = fitted_factors(latency_ms, {"64x1": NETWORKS["64x1"]}, LAYERS, GEMMS, rest_ms=REST_MS)
    assert found == pytest.approx({"dense": TRUE["dense"]})


def test_a_prediction_multiplies_each_form_by_the_factor_of_its_pattern() -> None:
    forms = {"blocks.0.fc1": ("64x1", 0.5), "blocks.1.fc2": ("32x32", 0.8)}
    corrected = msgspec.structs.replace(PROFILE, factors=TRUE)
    assert predicted_ms(corrected, forms) == pytest.approx(inside_ms(forms))
    # 1 ms rest, dense 1 + 2 ms, 2 ms of which half, 1 ms of which four tenths are saved
    assert predicted_ms(PROFILE, forms) == pytest.approx(1.0 + 3.0 + 1.0 + 0.6)
    assert predicted_ms(PROFILE, {"blocks.0.fc1": ("64x1", 0.1)}) == float("inf")
    by_form = {(g.pattern, g.sparsity, g.out_features): g for g in costs_in_network(corrected)}
    assert by_form["64x1", 0.2, 128].latency_ms == pytest.approx(1.6 * 1.25)


def test_a_pattern_has_a_network_with_every_layer_at_a_measured_sparsity() -> None:
    forms = NETWORKS["64x1"]
    assert forms.keys() == {layer.name for layer in LAYERS}
    assert {pattern for pattern, _ in forms.values()} == {"64x1"}
    assert {sparsity for _, sparsity in forms.values()} <= set(GRID)


def test_the_emptied_network_leaves_what_no_block_divides_dense() -> None:
    odd = msgspec.structs.replace(LAYERS[0], name="odd", out_features=100)
    forms = emptied_forms((*LAYERS, odd), ("2:4", "64x1", "32x32"))
    assert set(forms.values()) == {("64x1", 1.0)}
    assert "odd" not in forms


def test_mixed_networks_use_all_patterns_also_between_the_measured_sparsities() -> None:
    many = LAYERS * 25
    generator = random.Random(3)
    drawn = [form for _ in many for form in mixed_forms(LAYERS, GEMMS, generator).values()]
    assert {pattern for pattern, _ in drawn} == {"64x1", "32x32"}
    assert {sparsity for _, sparsity in drawn} == {round(0.2 + 0.05 * n, 2) for n in range(13)}
    assert 0.7 < len(drawn) / (len(many) * len(LAYERS)) < 0.9


def test_sparsity_one_is_no_sparsity_to_choose() -> None:
    assert measured_sparsities(GEMMS, LAYERS[0]) == {"64x1": GRID, "32x32": GRID}


def test_the_energy_of_the_rest_is_the_emptied_networks_less_its_empty_layers() -> None:
    emptied_as = dict.fromkeys((layer.name for layer in LAYERS), "32x32")
    # an empty layer of 32x32 takes half of 2 or 1 ms at 5 W
    assert rest_energy_mj(REST_MJ + 15.0, LAYERS, GEMMS, emptied_as) == pytest.approx(REST_MJ)
    assert rest_energy_mj(None, LAYERS, GEMMS, emptied_as) is None
    silent = tuple(msgspec.structs.replace(g, energy_mj=None) for g in GEMMS)
    assert rest_energy_mj(9.0, LAYERS, silent, emptied_as) is None  # a window that failed
    assert rest_energy_mj(9.0, LAYERS, silent, {}) is None  # what a dense layer needs is not known
    nothing = tuple(msgspec.structs.replace(g, energy_mj=0.0) for g in GEMMS)
    assert rest_energy_mj(9.0, LAYERS, nothing, emptied_as) == 9.0


def test_the_energies_of_the_parts_are_held_against_the_whole_network() -> None:
    # dense layers take 2 + 1 + 2 + 1 ms at 6 W beside the 4 mJ of the rest
    assert energy_sum(50.0, REST_MJ, LAYERS, GEMMS) == pytest.approx(40.0 / 50.0)
    # and 25 % more of each where that is what they take more in time
    assert energy_sum(50.0, REST_MJ, LAYERS, GEMMS, factor=1.25) == pytest.approx(49.0 / 50.0)
    assert energy_sum(None, REST_MJ, LAYERS, GEMMS) is None
    assert energy_sum(50.0, None, LAYERS, GEMMS) is None
    silent = tuple(msgspec.structs.replace(g, energy_mj=None) for g in GEMMS)
    assert energy_sum(50.0, REST_MJ, LAYERS, silent) is None


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine without an engine, whose networks take what inside_ms says."""
    exported: list[str] = []

    def export(_: object, forms: dict[str, tuple[str, float]], path: Path) -> None:
        path.write_text(str(inside_ms(forms)))

    def timed(_: object, paths: dict[str, Path], **__: object) -> tuple[Any, dict[str, float]]:
        exported.extend(paths)
        found = {
            name: SimpleNamespace(median_ms=float(path.read_text())) for name, path in paths.items()
        }
        return found, {}

    monkeypatch.setattr(whole_networks, "export_forms", export)
    monkeypatch.setattr(whole_networks, "_timed", timed)
    return exported


def measured(tmp_path: Path, gemms: tuple[GemmCost, ...]) -> whole_networks.Networks:
    dense = tmp_path / "dense.onnx"
    dense.write_text(str(inside_ms({})))
    walk = SimpleNamespace(layers=LAYERS)
    job: Any = SimpleNamespace(walk=walk, patterns=("64x1", "32x32"))
    return measure_networks(job, dense, gemms, seconds=1.0)


def test_a_mixed_network_that_fitted_nothing_says_how_well_the_profile_predicts(
    tmp_path: Path, made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRUE, "64x1", 1.0)  # an empty layer costs alone what it costs inside
    found = measured(tmp_path, GEMMS)
    assert made_up == ["dense", "emptied", "64x1", "32x32", "mixed"]
    assert found.rest_ms == pytest.approx(REST_MS)
    assert found.factors == pytest.approx(TRUE)
    assert found.mixed_error == pytest.approx(0.0, abs=1e-12)


def test_without_any_sparse_form_only_the_dense_factor_is_known(
    tmp_path: Path, made_up: list[str]
) -> None:
    few = tuple(g for g in GEMMS if g.pattern == "dense" or g.sparsity == 1.0)
    found = measured(tmp_path, few)
    assert made_up == ["dense", "emptied"]
    assert found.factors.keys() == {"dense"}
    assert found.mixed_error is None
