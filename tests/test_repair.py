import pytest
import torch

from lpvit_edge.errors import PruningError
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.repair import (
    Statistics,
    expand,
    keep_mask,
    normal_equations,
    relative_error,
    removal_costs,
    resolve,
    unmasked_solution,
)

N, K, TOKENS = 16, 24, 400


def layer(*, drift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Statistics]:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(K, K, generator=generator, dtype=torch.float64)
    x = torch.randn(TOKENS, K, generator=generator, dtype=torch.float64) @ mixing
    z = x + drift * torch.randn(TOKENS, K, generator=generator, dtype=torch.float64)
    W = torch.randn(N, K, generator=generator, dtype=torch.float64)
    statistics = Statistics(
        A=z.T @ z / TOKENS,
        B=W @ x.T @ z / TOKENS,
        target_energy=float((x @ W.T).square().sum(1).mean()),
        tokens=TOKENS,
    )
    return W, x, z, statistics


def test_nothing_pruned_and_no_drift_gives_the_weight_back() -> None:
    W, _, _, statistics = layer()
    system = normal_equations(W, statistics, damping=0.01, free=K)
    torch.testing.assert_close(unmasked_solution(system), W)


@pytest.mark.parametrize("name", ["8x1", "4x4", "16x2", "1x1"])
def test_the_repaired_weight_is_the_least_squares_solution_on_its_mask(name: str) -> None:
    pattern = parse_pattern(name)
    W, x, z, statistics = layer(drift=0.5)
    system = normal_equations(W, statistics, damping=1e-9, free=K)
    costs = removal_costs(unmasked_solution(system), system, pattern, steps=8)
    mask = keep_mask(costs, sparsity=0.5)
    V = resolve(system, mask, pattern)
    full = expand(mask, pattern)
    assert full.shape == W.shape
    assert not V[~full].any()
    for row in range(N):
        S = full[row].nonzero()[:, 0]
        best = torch.linalg.lstsq(z[:, S], x @ W[row]).solution
        torch.testing.assert_close(V[row, S], best, rtol=1e-4, atol=1e-5)


def test_the_relative_error_is_the_one_measured_on_the_tokens() -> None:
    W, x, z, statistics = layer(drift=0.5)
    system = normal_equations(W, statistics, damping=1e-6, free=K)
    V = unmasked_solution(system) * 0.7
    measured = (x @ W.T - z @ V.T).square().sum() / (x @ W.T).square().sum()
    assert relative_error(V, statistics) == pytest.approx(float(measured), rel=1e-6)


def test_removing_one_block_costs_what_the_score_says() -> None:
    pattern = parse_pattern("8x2")
    W, x, _, statistics = layer()
    system = normal_equations(W, statistics, damping=1e-9, free=K)
    costs = removal_costs(W, system, pattern, steps=1000)
    cheapest = int(costs.flatten().argmin())
    mask = torch.ones_like(costs, dtype=torch.bool)
    mask.view(-1)[cheapest] = False
    V = resolve(system, mask, pattern)
    rise = float((x @ (W - V).T).square().sum(1).mean())
    assert float(costs.flatten()[cheapest]) == pytest.approx(rise, rel=1e-3)


def test_selection_with_repair_beats_magnitude_with_repair() -> None:
    pattern = parse_pattern("8x1")
    W, _, _, statistics = layer()
    system = normal_equations(W, statistics, damping=1e-6, free=K)
    obs = keep_mask(removal_costs(W, system, pattern, steps=24), sparsity=0.5)
    magnitude = keep_mask(W.square().view(2, 8, K, 1).sum((1, 3)), sparsity=0.5)
    errors = [relative_error(resolve(system, m, pattern), statistics) for m in (obs, magnitude)]
    assert errors[0] < errors[1]


def test_the_bias_column_is_never_pruned_and_takes_over_the_mean() -> None:
    W, x, _, _ = layer()
    x = torch.cat([x + 3.0, torch.ones(TOKENS, 1, dtype=torch.float64)], 1)
    W = torch.cat([W, torch.zeros(N, 1, dtype=torch.float64)], 1)
    A = x.T @ x / TOKENS
    statistics = Statistics(A=A, B=W @ A, target_energy=1.0, tokens=TOKENS)
    system = normal_equations(W, statistics, damping=1e-9, free=K)
    pattern = parse_pattern("16x1")
    V = resolve(system, torch.zeros(1, K, dtype=torch.bool), pattern)
    torch.testing.assert_close(V[:, -1], (x @ W.T).mean(0), rtol=1e-6, atol=1e-6)


def test_statistics_that_cannot_prune_are_refused_in_words() -> None:
    W, _, _, statistics = layer()
    statistics.A[0, 0] = torch.nan
    with pytest.raises(PruningError, match="NaN or Inf"):
        normal_equations(W, statistics, damping=0.01, free=K)
    statistics.A = torch.zeros(K, K, dtype=torch.float64)
    with pytest.raises(PruningError, match="all zero"):
        normal_equations(W, statistics, damping=0.01, free=K)


def test_the_mask_drops_exactly_the_share_asked_for() -> None:
    costs = torch.arange(40.0).view(4, 10)
    for sparsity in (0.0, 0.25, 0.5, 1.0):
        assert int((~keep_mask(costs, sparsity=sparsity)).sum()) == 40 * sparsity
