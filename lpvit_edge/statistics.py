"""What the linear layers of a model receive on the calibration images."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_edge.distributed import add_up
from lpvit_edge.layers import hooks
from lpvit_edge.repair import Statistics

_PANELS = 4  # of columns in which a Gram matrix is computed, its upper half only


class _Reached(Exception):  # noqa: N818, no error
    """The layer of interest has its input; the rest of the forward pass is not needed."""


def stage_input(model: nn.Module, stage: str, images: Tensor) -> Tensor:
    """What the model feeds one of its stages for images (n, 3, S, S)."""
    return _input_of(model, model.get_submodule(stage), images)


def _input_of(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """The input of a module for the model's input x; nothing after it runs."""
    seen: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handles = iter([module.register_forward_pre_hook(stop)])
    with hooks(handles), torch.no_grad(), contextlib.suppress(_Reached):
        model(x)
    return seen[0]


def stage_pass(
    stage: nn.Module, layers: Mapping[str, nn.Linear], batches: list[Tensor]
) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Run a stage once: the inputs (tokens, K) of its layers, and its outputs, for each batch."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    outputs: list[Tensor] = []

    def keep(name: str) -> RemovableHandle:
        return layers[name].register_forward_pre_hook(
            lambda _, args: inputs[name].append(_rows(args[0]))
        )

    with hooks(keep(name) for name in layers), torch.no_grad():
        for batch in batches:
            outputs.append(stage(batch))
    return inputs, outputs


def each_input(stage: nn.Module, layer: nn.Linear, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The input (tokens, K) of one layer, batch after batch; nothing after the layer runs."""
    for batch in batches:
        yield _rows(_input_of(stage, layer, batch))


def layer_statistics(
    stage: nn.Module,
    layer: nn.Linear,
    batches: Iterable[Tensor],
    dense_layer: nn.Linear,
    dense_inputs: Iterable[Tensor],
) -> Statistics:
    """A = E[z z^T], B = E[W x z^T] and E|W x|^2, where x is what the dense layer received.

    With a bias, x and z end in a constant 1, see lpvit_edge.repair. Products are float32 within a
    batch, the sum over batches, and over the processes that share them, is float64.
    """
    W = with_bias(dense_layer)
    N, K = W.shape
    A = torch.zeros(K, K, dtype=torch.float64, device=W.device)
    # x z^T costs K^2 a token, y z^T costs N K: the cheaper one is summed.
    cross = torch.zeros(min(N, K), K, dtype=torch.float64, device=W.device)
    energy, tokens = 0.0, 0
    for x, z in zip(dense_inputs, each_input(stage, layer, batches), strict=True):
        with torch.no_grad():
            y = dense_layer(x)
        energy += float(y.square().sum(dtype=torch.float64))
        tokens += len(z)
        one = z.new_ones(len(z), K - z.shape[1])
        z_one = torch.cat([z, one], 1)
        left = y if N < K else torch.cat([x, one], 1)
        A += gram(z_one)
        cross += left.T @ z_one
    sums = torch.tensor([energy, tokens], dtype=torch.float64)
    add_up(A, cross, sums)
    energy, tokens = float(sums[0]), int(sums[1])
    B = cross if N < K else W.double() @ cross
    return Statistics(
        A=_symmetric(A) / tokens, B=B / tokens, target_energy=energy / tokens, tokens=tokens
    )


def gram(z: Tensor) -> Tensor:
    """The upper half, by panels, of z^T z (K, K) for z (tokens, K); what lies below is zero."""
    K = z.shape[1]
    product = z.new_zeros(K, K)
    bounds = [round(K * panel / _PANELS) for panel in range(_PANELS + 1)]
    for start, end in itertools.pairwise(bounds):
        product[start:end, start:] = z[:, start:end].T @ z[:, start:]
    return product


def _symmetric(upper: Tensor) -> Tensor:
    return upper.triu() + upper.triu(1).T


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def with_bias(layer: nn.Linear) -> Tensor:
    """The weight (N, K), with the bias as a last column where there is one."""
    if layer.bias is None:
        return layer.weight.detach()
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
