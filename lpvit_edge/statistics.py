"""What the linear layers of a model receive on the calibration images."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_edge.layers import hooks
from lpvit_edge.repair import Statistics


def stage_input(model: nn.Module, stage: str, images: Tensor) -> Tensor:
    """What the model feeds one of its stages for images (n, 3, S, S)."""
    seen: list[Tensor] = []
    handle = model.get_submodule(stage).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with hooks(iter([handle])), torch.no_grad():
        model(images)
    return seen[0]


def layer_inputs(
    stage: nn.Module, layers: dict[str, nn.Linear], batches: list[Tensor]
) -> dict[str, list[Tensor]]:
    """Inputs (tokens, K) of each layer, one tensor per batch that the stage is run on."""
    calls: dict[str, list[Tensor]] = {name: [] for name in layers}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> RemovableHandle:
        return layers[name].register_forward_pre_hook(
            lambda _, args: calls[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )

    with hooks(keep(name) for name in layers), torch.no_grad():
        for batch in batches:
            stage(batch)
            for name, parts in calls.items():
                inputs[name].append(torch.cat(parts))
                parts.clear()
    return inputs


def layer_statistics(
    stage: nn.Module,
    layer: nn.Linear,
    batches: list[Tensor],
    dense_layer: nn.Linear,
    dense_inputs: list[Tensor],
) -> Statistics:
    """A = E[z z^T], C = E[x z^T] and E|W x|^2, where x is what the dense layer received.

    With a bias, x and z end in a constant 1, see lpvit_edge.repair.
    """
    constant = layer.bias is not None
    size = layer.in_features + constant
    A, C = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    energy, tokens = 0.0, 0
    for x, z in zip(dense_inputs, _each_input(stage, layer, batches), strict=True):
        with torch.no_grad():
            energy += float(dense_layer(x).double().square().sum())
        tokens += len(z)
        x_one, z_one = (_with_constant(part) if constant else part for part in (x, z))
        A += (z_one.T @ z_one).double()
        C += (x_one.T @ z_one).double()
    return Statistics(A=A / tokens, C=C / tokens, target_energy=energy / tokens, tokens=tokens)


def _each_input(stage: nn.Module, layer: nn.Linear, batches: list[Tensor]) -> Iterator[Tensor]:
    for batch in batches:
        yield layer_inputs(stage, {"": layer}, [batch])[""][0]


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def with_bias(layer: nn.Linear) -> Tensor:
    """The weight (N, K), with the bias as a last column where there is one."""
    if layer.bias is None:
        return layer.weight.detach()
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
