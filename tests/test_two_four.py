from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")
import torch
from torch import nn

from lpvit_edge.errors import PruningError, UnknownOptionError
from lpvit_edge.layers import Walk, walk
from lpvit_edge.models import load_model
from lpvit_edge.pattern import parse_pattern, refuse_unrunnable
from lpvit_edge.prune import Form, prune
from lpvit_edge.repair import (
    Statistics,
    System,
    choose_mask,
    normal_equations,
    relative_error,
    removal_costs,
    resolve,
)
from lpvit_edge.sensitivity import gather_moments, layer_curves

TWO_FOUR = parse_pattern("2:4")
N, K, TOKENS = 12, 32, 500


def layer(*, damping: float = 1e-9) -> tuple[torch.Tensor, torch.Tensor, Statistics, System]:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(K, K, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, K, generator=generator, dtype=torch.float64) @ mixing
    W = torch.randn(N, K, generator=generator, dtype=torch.float64)
    A = x.T @ x / TOKENS
    energy = float((x @ W.T).square().sum(1).mean())
    statistics = Statistics(A=A, B=W @ A, target_energy=energy, tokens=TOKENS)
    return W, x, statistics, normal_equations(W, statistics, damping=damping, free=K)


def kept_per_four(weight: torch.Tensor) -> set[int]:
    return set((weight != 0).reshape(-1, 4).sum(1).tolist())


def test_each_row_is_the_least_squares_solution_on_two_of_every_four() -> None:
    W, x, _, system = layer()
    mask = choose_mask(removal_costs(W, system, TWO_FOUR, steps=1), TWO_FOUR, sparsity=0.5)
    V = resolve(system, mask, TWO_FOUR)
    assert kept_per_four(V) == {2}
    for row in range(N):
        S = mask[row].nonzero()[:, 0]
        best = torch.linalg.lstsq(x[:, S], x @ W[row]).solution
        torch.testing.assert_close(V[row, S], best, rtol=1e-4, atol=1e-5)


def test_the_first_pair_of_a_row_costs_what_its_removal_adds() -> None:
    W, x, _, system = layer()
    costs = removal_costs(W, system, TWO_FOUR, steps=1)
    for row in range(N):
        pair = costs[row, :4].argsort()[:2]
        left = [column for column in range(K) if column not in pair.tolist()]
        best = torch.linalg.lstsq(x[:, left], x @ W[row]).solution
        rise = float((x @ W[row] - x[:, left] @ best).square().mean())
        assert float(costs[row, pair].sum()) == pytest.approx(rise, rel=1e-4)


def test_the_sweep_leaves_less_error_than_the_largest_two_of_four() -> None:
    W, _, statistics, system = layer(damping=0.01)
    swept = choose_mask(removal_costs(W, system, TWO_FOUR, steps=1), TWO_FOUR, sparsity=0.5)
    largest = choose_mask(W.square(), TWO_FOUR, sparsity=0.5)
    errors = [
        relative_error(resolve(system, mask, TWO_FOUR), statistics) for mask in (swept, largest)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_constant_column_after_the_inputs_is_kept() -> None:
    W, x, _, _ = layer()
    x = torch.cat([x, torch.ones(TOKENS, 1, dtype=torch.float64)], 1)
    W = torch.cat([W, torch.full((N, 1), 3.0, dtype=torch.float64)], 1)
    A = x.T @ x / TOKENS
    statistics = Statistics(A=A, B=W @ A, target_energy=1.0, tokens=TOKENS)
    system = normal_equations(W, statistics, damping=1e-9, free=K)
    costs = removal_costs(W, system, TWO_FOUR, steps=1)
    assert costs.shape == (N, K)
    V = resolve(system, choose_mask(costs, TWO_FOUR, sparsity=0.5), TWO_FOUR)
    assert bool((V[:, -1] != 0).all())
    assert kept_per_four(V[:, :-1]) == {2}


def test_rows_that_cannot_be_solved_are_refused_in_words() -> None:
    _, _, _, system = layer()
    broken = System(A=-system.A, B=system.B, free=K, damping=0.0)
    with pytest.raises(PruningError, match="not positive definite; use more"):
        resolve(broken, torch.ones(N, K, dtype=torch.bool), TWO_FOUR)


@pytest.fixture(scope="module")
def subject(tiny_project: Path) -> tuple[nn.Module, Walk, torch.Tensor]:
    model = load_model(str(tiny_project / "model.toml")).module
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, walk(model, image_size=32), images


def test_every_layer_of_a_model_ends_with_two_of_every_four(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    forms = {shape.name: Form(pattern=TWO_FOUR, sparsity=0.5) for shape in walked.layers}
    pruned = model
    for entry, pruned in prune(model, walked, forms, images):
        assert (entry.pattern, entry.sparsity) == ("2:4", 0.5)
        assert kept_per_four(pruned.get_parameter(f"{entry.layer}.weight")) == {2}
    with torch.no_grad():
        error = (pruned(images) - model(images)).square().mean() / model(images).var()
    assert float(error) < 0.5


def test_another_sparsity_than_a_half_is_refused(
    subject: tuple[nn.Module, Walk, torch.Tensor],
) -> None:
    model, walked, images = subject
    forms = {walked.layers[0].name: Form(pattern=TWO_FOUR, sparsity=0.75)}
    with pytest.raises(PruningError, match=r"qkv: sparsity 0.75 in 2:4, which has one only: 0.5"):
        next(prune(model, walked, forms, images))


def test_a_curve_has_one_point_besides_zero(subject: tuple[nn.Module, Walk, torch.Tensor]) -> None:
    model, walked, images = subject
    moments = gather_moments(model, walked, images, None, patterns=(TWO_FOUR,))
    shape = walked.layers[0]
    module = model.get_submodule(shape.name)
    assert isinstance(module, nn.Linear)
    curves = list(layer_curves(shape, module, moments[shape.name], images=len(images)))
    assert [(c.pattern, c.criterion, c.sparsity) for c in curves] == [
        ("2:4", "taylor", (0.0, 0.5)),
        ("2:4", "hessian", (0.0, 0.5)),
    ]
    assert all(c.distortion[0] == 0.0 < c.distortion[1] < np.inf for c in curves)


def test_an_engine_without_a_kernel_refuses_it_and_names_one_that_has_it() -> None:
    refuse_unrunnable(("64x16", "2:4"), engine="tensorrt")
    with pytest.raises(UnknownOptionError, match=r"'2:4': engine openvino .* --engine tensorrt"):
        refuse_unrunnable(("64x1", "2:4"), engine="openvino")
    with pytest.raises(UnknownOptionError, match="left dense by itself"):
        refuse_unrunnable(("dense",), engine="tensorrt")
