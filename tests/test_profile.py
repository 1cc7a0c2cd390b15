"""The layer profile: what is measured first, what a short budget leaves out, what is kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lpvit_edge import profile as profiling
from lpvit_edge.errors import PruningError
from lpvit_edge.layer_networks import LayerForm, layer_forms, network
from lpvit_edge.profile_doubts import reasons
from lpvit_edge.profile_partial import Partial
from lpvit_edge.profile_power import checked, origin
from lpvit_edge.records import GemmCost, LayerShape, ModelIdentity, PowerNote
from lpvit_profilers.base import STUCK, Conditions, opened
from lpvit_profilers.estimate import EstimatedSource


def shape(name: str, in_features: int, out_features: int) -> LayerShape:
    return LayerShape(
        name=name,
        tokens=10,
        in_features=in_features,
        out_features=out_features,
        activation="none",
    )


SMALL, LARGE, TWIN = shape("small", 64, 64), shape("large", 64, 256), shape("twin", 64, 256)
LAYERS = (SMALL, LARGE, TWIN)
IDENTITY = ModelIdentity(name="tiny", weights_sha256="0", image_size=32)


def cost(
    layer: LayerShape, pattern: str = "dense", sparsity: float = 0.0, **changes: Any
) -> GemmCost:
    fields: dict[str, Any] = {"latency_ms": 1.0, "spread_ms": 0.0, "stable": True}
    return GemmCost(
        tokens=layer.tokens,
        in_features=layer.in_features,
        out_features=layer.out_features,
        activation=layer.activation,
        pattern=pattern,
        sparsity=sparsity,
        **(fields | changes),
    )


class Stopwatch:
    """Stands in for measure_form and remembers what it was asked, and for how long."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str, float]] = []
        self.seconds: list[float] = []

    def __call__(
        self, form: LayerForm, engine: str, threads: int, seconds: float, sensor: object
    ) -> GemmCost:
        self.asked.append((form.shape.out_features, form.pattern, form.sparsity))
        self.seconds.append(seconds)
        return cost(form.shape, form.pattern, form.sparsity)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(profiling, "measure_form", watch)
    return watch


def profiled(**changes: Any) -> tuple[GemmCost, ...]:
    arguments: dict[str, Any] = {"engine": "fake", "threads": 1, "patterns": ("64x1", "64x16")}
    arguments |= {"sparsities": (0.5, 1.0), **changes}
    return profiling.profile_gemms(LAYERS, **arguments)


REQUIRED = [(256, "dense", 0.0), (64, "dense", 0.0), (256, "64x1", 1.0), (64, "64x1", 1.0)]


def test_each_distinct_layer_is_measured_once_the_largest_first(stopwatch: Stopwatch) -> None:
    profiled()
    assert stopwatch.asked == [
        *REQUIRED,
        (256, "64x1", 0.5),
        (256, "64x16", 0.5),
        (256, "64x16", 1.0),
        (64, "64x1", 0.5),
        (64, "64x16", 0.5),
        (64, "64x16", 1.0),
    ]


def test_a_budget_that_has_passed_leaves_only_what_every_prediction_needs(
    stopwatch: Stopwatch,
) -> None:
    costs = profiled(seconds=1e-9)
    assert stopwatch.asked == REQUIRED
    assert len(costs) == len(REQUIRED)


def test_a_budget_gives_layers_with_more_work_more_of_it(stopwatch: Stopwatch) -> None:
    profiled(seconds=20.0)
    large, small = stopwatch.seconds[:2]
    assert large == pytest.approx(small * 8**0.5)  # two layers of four times the work
    assert sum(stopwatch.seconds) == pytest.approx(10.0)  # the other half loads networks


def test_a_budget_counts_the_energy_windows_of_every_form(stopwatch: Stopwatch) -> None:
    profiled(seconds=80.0, sensor=object())  # ten forms, two windows of 3 s each
    assert sum(stopwatch.seconds) == pytest.approx(10.0)


def test_what_an_interrupted_profile_left_is_not_measured_again(stopwatch: Stopwatch) -> None:
    seen: list[int] = []
    kept = (cost(LARGE, latency_ms=7.0), cost(SMALL))
    costs = profiled(kept=kept, keep=lambda gemms: seen.append(len(gemms)))
    assert stopwatch.asked[0] == REQUIRED[2]
    assert costs[0].latency_ms == 7.0
    assert seen == list(range(3, 11))


def test_costs_of_an_interrupted_profile_that_are_not_reached_yet_stay_on_disk(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = profiled()
    without_first = every[1:]  # as when the first form drowned in its scatter
    written: list[tuple[GemmCost, ...]] = []

    def interrupted(costs: tuple[GemmCost, ...]) -> None:
        written.append(costs)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiled(kept=without_first, keep=interrupted)
    assert sorted(written[0], key=repr) == sorted(every, key=repr)


def test_dense_is_no_pattern_to_time_beside_dense() -> None:
    with pytest.raises(PruningError, match="timed without being named"):
        profiled(patterns=("64x1", "dense"))


def test_two_four_is_timed_at_its_one_sparsity_as_a_plain_product_with_zeros() -> None:
    onnx = pytest.importorskip("onnx")
    (form,) = (f for f in layer_forms((LARGE,), ("2:4",), (0.3, 0.5, 1.0)) if f.pattern == "2:4")
    assert form.sparsity == 0.5
    model = onnx.load_from_string(network(form))
    assert "BlockSparseLinear" not in {node.op_type for node in model.graph.node}
    (weight,) = (i for i in model.graph.initializer if i.name == "w0")
    values = onnx.numpy_helper.to_array(weight).T
    assert set((values != 0).reshape(-1, 4).sum(1)) == {2}


def test_copies_hold_the_weights_of_the_whole_model_within_limits() -> None:
    def copies(*sizes: tuple[int, int]) -> list[int]:
        layers = tuple(shape(str(i), k, n) for i, (k, n) in enumerate(sizes))
        return [form.copies for form in layer_forms(layers, (), ())]

    assert copies((64, 64)) == [4]  # not fewer than four
    assert copies((64, 256), (64, 512)) == [4, 4]
    assert copies(*[(64, 256)] * 6, (64, 512)) == [8, 4]  # 8 times (64, 256), 4 times (64, 512)
    assert copies(*[(64, 64)] * 100) == [24]  # not more than 24
    assert copies(*[(4096, 1024)] * 24) == [6]  # and not more than 96 MiB
    (_, sparse) = layer_forms((shape("a", 4096, 1024),) * 24, ("64x1",), (0.5,))
    assert sparse.copies == 12  # of half the weights


def test_a_form_that_scattered_is_timed_again_and_the_steadier_time_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: dict[tuple[int, str, float], list[float]] = {}

    def shaky(form: LayerForm, *_: object) -> GemmCost:
        asked = taken.setdefault((form.shape.out_features, form.pattern, form.sparsity), [])
        asked.append(1.0)
        spread_ms = (0.9, 0.2)[len(asked) - 1]
        return cost(
            form.shape, form.pattern, form.sparsity, spread_ms=spread_ms,
            latency_ms=float(len(asked)), stable=False,
        )  # fmt: skip

    monkeypatch.setattr(profiling, "measure_form", shaky)
    costs = profiled()
    assert {len(times) for times in taken.values()} == {2}
    assert {gemm.latency_ms for gemm in costs} == {2.0}


def test_a_layer_alone_gets_an_input_of_its_own_in_every_copy() -> None:
    onnx = pytest.importorskip("onnx")
    form = layer_forms((LARGE, TWIN, SMALL), ("64x1",), (0.5,))[-1]
    assert (form.pattern, form.copies) == ("64x1", 9)
    full, base = (onnx.load_from_string(network(form, empty=empty)) for empty in (False, True))
    nodes = [node for node in full.graph.node if node.op_type == "BlockSparseLinear"]
    assert [node.input[0] for node in nodes] == [f"x{index}" for index in range(9)]
    norms = [node for node in full.graph.node if node.op_type == "LayerNormalization"]
    assert [node.output[0] for node in norms] == [f"x{index}" for index in range(9)]
    assert norms == [node for node in base.graph.node if node.op_type == "LayerNormalization"]
    assert "BlockSparseLinear" not in {node.op_type for node in base.graph.node}


def test_the_rest_is_the_emptied_network_without_its_empty_layers() -> None:
    gemms = (
        cost(LARGE, latency_ms=3.0),
        cost(SMALL, latency_ms=1.0),
        cost(LARGE, "64x1", 1.0, latency_ms=0.25),
    )
    emptied_as = {"large": "64x1", "twin": "64x1"}  # "small" stayed dense
    assert profiling.rest_ms(5.0, LAYERS, gemms, emptied_as) == 5.0 - 2 * 0.25 - 1.0
    assert profiling.dense_layers_ms(LAYERS, gemms) == 7.0


def test_the_rank_correlation_needs_three_layers() -> None:
    gemms = (cost(LARGE, latency_ms=3.0), cost(SMALL, latency_ms=1.0))
    in_place = {"large": 4.0, "small": 0.5, "twin": 5.0}
    # ranks 2.5, 1, 2.5 against 2, 1, 3
    assert profiling.rank_correlation(in_place, LAYERS, gemms) == pytest.approx(0.75**0.5)
    del in_place["twin"]
    assert profiling.rank_correlation(in_place, LAYERS, gemms) is None


@pytest.mark.parametrize(
    ("full_mj", "base_mj", "layer_mj"),
    [(900.0, 500.0, 2.5), (500.0, 900.0, None), (None, 500.0, None)],
    ids=["difference", "lost-in-noise", "silent"],
)
def test_a_layers_energy_is_a_share_of_the_difference_or_unknown(
    monkeypatch: pytest.MonkeyPatch,
    full_mj: float | None,
    base_mj: float,
    layer_mj: float | None,
) -> None:
    energies = iter((full_mj, base_mj))

    def window(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(energy_mj=next(energies), calls=40, reason=None, is_stuck=False)

    monkeypatch.setattr("lpvit_profilers.energy_window.measure_window", window)
    runs: Any = {"full": lambda: None, "base": lambda: None}
    sensor: Any = None
    info: Any = SimpleNamespace(quality="measured")
    half: Any = SimpleNamespace(copies=4, sparsity=0.5)
    assert profiling._energy_mj(runs, sensor, info, form=half) == layer_mj


@pytest.mark.parametrize(("full_mj", "layer_mj"), [(900.0, 0.0), (None, None)])
def test_an_empty_layer_that_cannot_be_told_from_none_needs_no_energy(
    monkeypatch: pytest.MonkeyPatch, full_mj: float | None, layer_mj: float | None
) -> None:
    energies = iter((full_mj, 1000.0))

    def window(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(energy_mj=next(energies), calls=40, reason=None, is_stuck=False)

    monkeypatch.setattr("lpvit_profilers.energy_window.measure_window", window)
    runs: Any = {"full": lambda: None, "base": lambda: None}
    info: Any = SimpleNamespace(quality="measured")
    empty: Any = SimpleNamespace(copies=4, sparsity=1.0)
    assert profiling._energy_mj(runs, info, info, form=empty) == layer_mj


def test_a_window_with_a_doubt_gives_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(reason: str | None, *, stuck: bool, quality: str = "measured") -> float | None:
        found = SimpleNamespace(energy_mj=900.0, calls=40, reason=reason, is_stuck=stuck)
        monkeypatch.setattr("lpvit_profilers.energy_window.measure_window", lambda *_, **__: found)
        info: Any = SimpleNamespace(quality=quality)
        return profiling.call_energy_mj(lambda: None, info, info)

    assert measured("the sensor and the work in step", stuck=False) is None
    assert measured(None, stuck=True) is None
    assert measured(None, stuck=False) == 22.5
    assert measured(None, stuck=True, quality="estimated") == 22.5  # a load curve at a steady load


def sensor(
    *,
    suspect: bool = False,
    stuck: bool = False,
    has_counter: bool = False,
    quality: str = "measured",
    throttling: tuple[str, ...] = (),
) -> Any:
    sampler = SimpleNamespace(
        was_suspect=suspect,
        never_moved=stuck,
        conditions=lambda **_: (Conditions(), Conditions(throttling=throttling)),
    )
    return sampler, SimpleNamespace(has_counter=has_counter, quality=quality)


def test_doubts_about_the_energies_are_in_the_profile() -> None:
    note = PowerNote(source="x", scope="module_input", quality="measured", reason=None)
    with_energy = cost(SMALL, energy_mj=1.0)
    found = checked(note, (with_energy, cost(LARGE)), sensor(suspect=True))
    assert found.quality == "suspect"
    assert found.reason is not None
    assert "no energy for 1 of 2 forms" in found.reason
    assert checked(note, (cost(LARGE),), sensor(suspect=True)).quality == "unavailable"
    assert checked(note, (with_energy,), sensor()) == note
    assert checked(note, (with_energy,), sensor(), was_suspect=True).quality == "suspect"


def test_energies_of_a_stuck_sensor_do_not_pass_for_measured() -> None:
    note = PowerNote(source="x", scope="module_input", quality="measured", reason=None)
    found = checked(note, (cost(SMALL, energy_mj=1.0),), sensor(stuck=True))
    assert (found.quality, found.reason) == ("suspect", STUCK)
    # a counter is read, not the power that was made from it
    counted = checked(note, (cost(SMALL, energy_mj=1.0),), sensor(stuck=True, has_counter=True))
    assert counted == note
    estimate = msgspec.structs.replace(note, quality="estimated")
    costs = (cost(SMALL, energy_mj=1.0),)
    assert checked(estimate, costs, sensor(stuck=True, quality="estimated")) == estimate


def test_a_device_that_was_throttled_during_the_profile_is_said_to_have_been() -> None:
    note = PowerNote(source="x", scope="module_input", quality="measured", reason=None)
    found = checked(note, (cost(SMALL, energy_mj=1.0),), sensor(throttling=("heat", "brake")))
    assert found.reason == "the device was throttled (brake, heat)"


def said(*gemms: GemmCost, total: float = 1.0, **changes: Any) -> list[str]:
    """The doubts about these forms and whole networks of which nothing else is known."""
    networks: dict[str, Any] = {"rest_ms": 1.0, "factors": {"dense": 1.0, "64x1": 1.0}}
    networks |= {"mixed_error": None, "energy_sum": None, **changes}
    return list(reasons(gemms, SimpleNamespace(**networks), drift=0.0, total=total))  # type: ignore[arg-type]


def test_a_time_of_nothing_is_a_reason_to_distrust_the_profile() -> None:
    gemms = (cost(LARGE, latency_ms=0.0), cost(LARGE, "64x1", 1.0, latency_ms=0.0))
    (lost, rest) = said(*gemms, rest_ms=0.0)
    assert lost.startswith("1 forms took no longer than no layer at all")
    assert rest.startswith("the emptied network took no longer than its empty layers")
    assert not said(cost(LARGE))


def test_parts_that_do_not_add_up_are_a_reason_to_distrust_the_profile() -> None:
    assert not said(cost(LARGE), total=0.81) + said(cost(LARGE), total=1.24)
    assert said(cost(LARGE), total=0.79)[0].startswith("the parts add up to 0.79 of the whole")


def test_energies_that_do_not_add_up_are_a_reason_to_distrust_the_profile() -> None:
    assert not said(cost(LARGE), energy_sum=1.2)
    (doubt,) = said(cost(LARGE), energy_sum=1.4)
    assert doubt.startswith("the energies of the parts add up to 1.40 of the whole network's")


def test_a_mixed_network_that_was_predicted_badly_is_a_reason_to_distrust_the_profile() -> None:
    (off,) = said(cost(LARGE), mixed_error=-0.12)
    assert off.startswith("a network of mixed forms was predicted -12% off")


@pytest.mark.parametrize("k", [0.79, 1.6])
def test_a_factor_far_from_one_is_a_doubt_that_names_the_pattern_and_the_value(k: float) -> None:
    forms = (cost(LARGE), cost(LARGE, "64x1", 0.5))
    (doubt,) = said(*forms, factors={"dense": 1.0, "64x1": k})
    assert f"longer or shorter in a network than alone: 64x1 {k:.2f} times (0.8" in doubt
    assert not said(*forms, factors={"dense": 0.8, "64x1": 1.25})


def test_all_factors_far_from_one_are_one_doubt() -> None:
    forms = (cost(LARGE), cost(LARGE, "64x1", 0.5), cost(LARGE, "64x16", 0.5))
    (doubt,) = said(*forms, factors={"dense": 0.58, "64x1": 0.52, "64x16": 1.1})
    assert "alone: 64x1 0.52 times, dense 0.58 times (0.8 to 1.25 can be believed)" in doubt


def test_a_pattern_without_a_factor_does_not_pass_for_one_whose_factor_is_1() -> None:
    forms = (cost(LARGE), cost(LARGE, "64x1", 0.5))
    (doubt,) = said(*forms, factors={"dense": 1.0})
    assert doubt.startswith("no factor k for 64x1,")
    # with no block left it has no network of its own, and needs none
    assert not said(cost(LARGE), cost(LARGE, "64x1", 1.0), factors={"dense": 1.0})


def test_estimated_energies_have_another_origin_than_measured_ones_and_than_none() -> None:
    def stated(tdp_w: float) -> str:
        with opened(EstimatedSource(tdp_w=tdp_w)) as source:
            return origin((Any, source.info))  # type: ignore[arg-type]

    assert origin(None) == "none"
    assert stated(65.0).endswith("estimated")
    assert stated(65.0) != stated(35.0)


def test_costs_of_other_conditions_are_not_taken_over(tmp_path: Path) -> None:
    def partial(fingerprint: str, *, power: str = "none", suspect: bool = False) -> Partial:
        job: Any = SimpleNamespace(
            path=lambda name: tmp_path / name,
            model=SimpleNamespace(identity=IDENTITY),
            engine="fake",
            threads=1,
            patterns=("64x1",),
        )
        return Partial(job, fingerprint, power=power, is_suspect=lambda: suspect)

    partial("here").keep((cost(SMALL),))
    assert partial("here").kept() == (cost(SMALL),)
    assert partial("elsewhere").kept() == ()
    assert partial("here", power="estimate, load curve at 65 W TDP").kept() == ()
    suspicious = partial("here")
    suspicious.keep((cost(SMALL),))
    assert not suspicious.was_suspect
    again = partial("here", suspect=True)
    again.kept()
    assert not again.was_suspect
    again.keep((cost(SMALL),))
    taken_over = partial("here")
    assert taken_over.kept() == (cost(SMALL),)
    assert taken_over.was_suspect
    taken_over.keep((cost(SMALL),))
    third = partial("here")
    third.kept()
    assert third.was_suspect
    partial("here").path.write_text("{")
    assert partial("here").kept() == ()
