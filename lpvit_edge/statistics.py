"""What the linear layers of a model receive on the calibration images."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_edge.distributed import add_up
from lpvit_edge.layers import hooks
from lpvit_edge.repair import Split, Statistics

_PANELS = 4  # of columns in which a Gram matrix is computed, its upper half only
_ONE_APART_IN = 4  # images of a batch


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
    batches: Sequence[Tensor],
    dense_layer: nn.Linear,
    dense_inputs: Iterable[Tensor],
) -> Statistics:
    """A = E[z z^T], B = E[W x z^T] and E|W x|^2, where x is what the dense layer received.

    With a bias, x and z end in a constant 1, see lpvit_edge.repair. Products are float32 within a
    batch, the sum over batches, and over the processes that share them, is float64. The last fourth
    of each batch's images is also counted apart, for choosing the damping.
    """
    W = with_bias(dense_layer)
    fit, apart = _Sums.of(W), _Sums.of(W)
    inputs = each_input(stage, layer, batches)
    for batch, x, z in zip(batches, dense_inputs, inputs, strict=True):
        with torch.no_grad():
            y = dense_layer(x)
        cut = len(z) - len(z) // len(batch) * (len(batch) // _ONE_APART_IN)
        fit.add(x[:cut], y[:cut], z[:cut])
        if cut < len(z):
            apart.add(x[cut:], y[cut:], z[cut:])
    for sums in (fit, apart):
        add_up(sums.A, sums.cross, sums.energy_and_tokens)
    both = _Sums.of(W)
    for sums in (fit, apart):
        both.A += sums.A
        both.cross += sums.cross
        both.energy_and_tokens += sums.energy_and_tokens
    found = both.means(W)
    if int(apart.energy_and_tokens[1]):
        found.split = Split(fit=fit.means(W), apart=apart.means(W))
    return found


class _Sums(msgspec.Struct, kw_only=True):
    """Sums over tokens; with a bias, x and z end in a constant 1."""

    A: Tensor  # (K, K) float64, the upper half of the sum of z z^T
    # x z^T costs K^2 a token, y z^T costs N K: the cheaper one is summed.
    cross: Tensor  # (min(N, K), K) float64
    energy_and_tokens: Tensor  # (2,) float64: of |W x|^2, and of 1

    @classmethod
    def of(cls, W: Tensor) -> "_Sums":
        N, K = W.shape
        zeros = W.new_zeros(K, K, dtype=torch.float64)
        return cls(
            A=zeros,
            cross=torch.zeros_like(zeros[: min(N, K)]),
            energy_and_tokens=torch.zeros(2, dtype=torch.float64),
        )

    def add(self, x: Tensor, y: Tensor, z: Tensor) -> None:
        """Count x (tokens, K) that the dense layer takes, y that it gives, z of the pruned one."""
        K = len(self.A)
        one = z.new_ones(len(z), K - z.shape[1])
        z_one = torch.cat([z, one], 1)
        left = y if y.shape[1] < K else torch.cat([x, one], 1)
        self.A += gram(z_one)
        self.cross += left.T @ z_one
        energy = float(y.square().sum(dtype=torch.float64))
        self.energy_and_tokens += self.energy_and_tokens.new_tensor([energy, len(z)])

    def means(self, W: Tensor) -> Statistics:
        energy, tokens = float(self.energy_and_tokens[0]), int(self.energy_and_tokens[1])
        B = self.cross if W.shape[0] < W.shape[1] else W.double() @ self.cross
        return Statistics(
            A=_symmetric(self.A) / tokens,
            B=B / tokens,
            target_energy=energy / tokens,
            tokens=tokens,
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
