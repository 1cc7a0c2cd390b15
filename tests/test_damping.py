"""The damping that is chosen for each layer on images kept apart."""

import pytest

pytest.importorskip("timm")
import torch
from torch import nn

from lpvit_edge.damping import LADDER, choose_damping
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.repair import DAMPING, Split, Statistics, normal_equations, resolve
from lpvit_edge.statistics import layer_statistics

N, K = 32, 48
MASKS = {
    "16x1": torch.arange(2 * K).reshape(2, K) % 2 == 0,
    "2:4": (torch.arange(K) % 4 < 2).expand(N, -1),
    "dense": None,
}


def of(W: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> Statistics:
    x, z = x.double(), z.double()
    y, n = x @ W.double().T, len(x)
    energy = float(y.square().sum() / n)
    return Statistics(A=z.T @ z / n, B=y.T @ z / n, target_energy=energy, tokens=n)


def drifted(*, tokens: int, noise: float) -> tuple[torch.Tensor, Split]:
    """A layer whose prefix has added noise to a low-dimensional input."""
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(N, K, generator=generator)
    basis = torch.randn(12, K, generator=generator)

    def part(count: int) -> Statistics:
        x = torch.randn(count, 12, generator=generator) @ basis
        return of(W, x, x + noise * torch.randn(count, K, generator=generator))

    return W, Split(fit=part(tokens), apart=part(4000))


@pytest.mark.parametrize("name", MASKS)
def test_few_noisy_tokens_get_more_damping_than_many(name: str) -> None:
    pattern, mask = parse_pattern(name), MASKS[name]
    W, few = drifted(tokens=40, noise=1.0)
    _, many = drifted(tokens=20_000, noise=1.0)
    assert choose_damping(W, few, pattern, mask, free=K) > DAMPING
    assert choose_damping(W, many, pattern, mask, free=K) < 0.1


@pytest.mark.parametrize("name", MASKS)
def test_what_is_chosen_errs_least_on_the_images_kept_apart(name: str) -> None:
    pattern, mask = parse_pattern(name), MASKS[name]
    W, split = drifted(tokens=60, noise=0.5)

    def error(share: float) -> float:
        system = normal_equations(W, split.fit, damping=share, free=K)
        V = resolve(system, mask, pattern)
        return float(((V @ split.apart.A) * V).sum() - 2 * (split.apart.B * V).sum())

    chosen = choose_damping(W, split, pattern, mask, free=K)
    assert error(chosen) == min(error(share) for share in LADDER)


def test_without_images_apart_the_fixed_damping_stays() -> None:
    W, _ = drifted(tokens=60, noise=0.5)
    assert choose_damping(W, None, parse_pattern("dense"), None, free=K) == DAMPING


def test_a_step_that_cannot_be_solved_is_passed_over() -> None:
    W, split = drifted(tokens=60, noise=0.5)
    A = split.fit.A - 0.005 * split.fit.A.diagonal().mean() * torch.eye(K)
    indefinite = Split(
        fit=Statistics(A=A, B=split.fit.B, target_energy=1.0, tokens=60), apart=split.apart
    )
    chosen = choose_damping(W, indefinite, parse_pattern("dense"), None, free=K)
    assert chosen >= 1e-2


def test_the_parts_of_a_layers_statistics_add_up_and_share_no_image() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    batches = [torch.randn(8, 3, 6), torch.randn(5, 3, 6), torch.randn(2, 3, 6)]
    inputs = [batch.reshape(-1, 6) for batch in batches]
    stage = nn.Sequential(layer)
    found = layer_statistics(stage, layer, batches, layer, inputs)
    assert found.split is not None
    fit, apart = found.split.fit, found.split.apart
    assert (fit.tokens, apart.tokens, found.tokens) == (36, 9, 45)
    z = torch.cat([torch.cat(inputs), torch.ones(45, 1)], 1).double()
    torch.testing.assert_close(found.A, z.T @ z / 45, rtol=1e-5, atol=1e-6)
    last = torch.cat([batches[0][6:], batches[1][4:]]).reshape(-1, 6).double()
    torch.testing.assert_close(apart.A[:6, :6], last.T @ last / 9, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((36 * fit.B + 9 * apart.B) / 45, found.B)
