"""Rotate the residual stream, so that whole blocks of the weights beside it carry next to nothing.

The stream of a Vision Transformer is written by the embedding and by the last layer of each
residual branch, and read through LayerNorms. A LayerNorm whose gain lies in the layers that read it
commutes with every orthogonal Q that keeps the vector of ones, for such a Q keeps the mean and the
variance over the channels. So each writer may be multiplied by Q and each reader by Q^T: another
basis of the stream, the same function, the same graph. SliceGPT (Ashkboos et al. 2024, arXiv
2401.15024) rotates networks with RMSNorm; keeping the ones, and with them LayerNorm, is our own.

Q brings the principal directions of what the attention writes, the strongest first, into groups of
neighbouring channels as long as a side of the blocks. What attention writes has a far lower rank
than the stream is wide, so most block rows of its output projection are then nearly zero.
"""

import copy
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_edge.distributed import add_up, from_main
from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk, hooks
from lpvit_edge.prune_refusals import refuse_broken_weights
from lpvit_edge.solve import Form

_TOLERANCE = 1e-4  # of the largest answer: what float32 sums in another order may differ
_BRANCHES = (("norm1", "attn.qkv", "attn.proj", "ls1"), ("norm2", "mlp.fc1", "mlp.fc2", "ls2"))


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """What writes and what reads the residual stream, by names as timm gives them."""

    width: int
    tokens: tuple[str, ...]  # parameters of the model itself: class token, positions
    embedding: str
    writers: tuple[tuple[str, str], ...]  # linear layer, and the LayerScale behind it
    readers: tuple[tuple[str, tuple[str, ...]], ...]  # LayerNorm, and the linear layers behind it


def rotated(
    model: nn.Module, walk: Walk, batches: list[Tensor], forms: Mapping[str, Form]
) -> nn.Module:
    """A copy of the model with the same answers, its stream in another basis.

    batches: calibration images (n, 3, S, S) of this process. Raises PruningError when the model is
    not built like timm's Vision Transformers, holds NaN or Inf, or answers differently afterwards.
    """
    refuse_broken_weights(model)
    stream = find_stream(model, walk)
    Q = rotation(_written(model, stream, batches), group=_group(forms, stream.width))
    turned = copy.deepcopy(model).cpu().double()
    with torch.no_grad():
        _apply(turned, stream, from_main(Q))
    turned = turned.to(batches[0].device, torch.float32).eval()
    _refuse_changed(model, turned, batches[0][:4])
    return turned


def find_stream(model: nn.Module, walk: Walk) -> Stream:
    """The writers and readers of a model's residual stream. Raises PruningError."""
    try:
        blocks = [f"blocks.{name}" for name, _ in model.get_submodule("blocks").named_children()]
        width = model.get_submodule(f"{blocks[0]}.norm1").get_parameter("weight").numel()
        last = "norm" if isinstance(model.get_submodule("norm"), nn.LayerNorm) else "fc_norm"
        branches = [(block, *branch) for block in blocks for branch in _BRANCHES]
        for block, *names, scale in branches:
            for name in names:
                model.get_submodule(f"{block}.{name}").get_parameter("bias")
            model.get_submodule(f"{block}.{scale}")
        model.get_submodule(last).get_parameter("bias")
        model.get_submodule("patch_embed.proj")
    except (AttributeError, IndexError) as error:
        raise PruningError(
            f"{type(model).__name__} is not built like timm's Vision Transformers, a LayerNorm "
            f"before each branch and biases everywhere ({error}); leave out --rotate"
        ) from error
    own = model.named_parameters(recurse=False)
    return Stream(
        width=width,
        tokens=tuple(name for name, value in own if value.shape[-1] == width),
        embedding="patch_embed.proj",
        writers=tuple((f"{b}.{writer}", f"{b}.{scale}") for b, _, _, writer, scale in branches),
        readers=(
            *((f"{b}.{norm}", (f"{b}.{reader}",)) for b, norm, reader, _, _ in branches),
            (last, tuple(walk.heads)),
        ),
    )


def _group(forms: Mapping[str, Form], width: int) -> int:
    """The shortest side, longer than one, of the blocks that are asked for."""
    patterns = [form.pattern for form in forms.values() if form.pattern.kind == "block"]
    sides = {side for pattern in patterns for side in (pattern.rows, pattern.cols)}
    return min((side for side in sides if side > 1 and width % side == 0), default=width)


def _written(model: nn.Module, stream: Stream, batches: list[Tensor]) -> Tensor:
    """What the attention writes: the second moments (D, D) of its layers, each of trace one.

    Raises PruningError, naming the layer, where a moment is not finite.
    """
    names = [name for name, _ in stream.writers if name.endswith("attn.proj")]
    moments = {name: torch.zeros(stream.width, stream.width).double() for name in names}

    def keep(name: str) -> RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> None:
            flat = y.reshape(-1, stream.width)
            moments[name] += (flat.T @ flat).cpu()

        return model.get_submodule(name).register_forward_hook(hook)

    with hooks(keep(name) for name in names), torch.no_grad():
        for batch in batches:
            model(batch)
    add_up(*moments.values())
    for name, C in moments.items():
        if not bool(C.isfinite().all()):
            raise PruningError(
                f"{name}: what it writes on the calibration images holds NaN or infinity; check "
                "the images and the weights"
            )
        C /= C.trace().clamp_min(torch.finfo(C.dtype).tiny)  # one that writes nothing counts none
    return torch.stack([*moments.values()]).sum(0)


def rotation(C: Tensor, *, group: int) -> Tensor:
    """Q (D, D), orthogonal, Q 1 = 1: eigenvectors of C (D, D) into groups of channels.

    Inside each group of `group` channels lie group - 1 directions without a mean, in all the
    strongest D - D / group; the weakest become the differences between the groups' means.
    """
    D = len(C)
    ones = torch.full((D,), D**-0.5, dtype=C.dtype)
    H = _contrasts(D).T
    V = H @ torch.linalg.eigh(H.T @ C @ H).eigenvectors.flip(1)
    inside = torch.kron(torch.eye(D // group, dtype=C.dtype), _contrasts(group))
    between = torch.kron(_contrasts(D // group), torch.full((1, group), group**-0.5).double())
    E = torch.cat([inside, between])
    Q: Tensor = torch.outer(ones, ones) + E.T @ V.T
    return Q


def _contrasts(n: int) -> Tensor:
    """Orthonormal rows (n - 1, n) that sum to zero."""
    basis = torch.eye(n, dtype=torch.float64)
    basis[:, 0] = 1.0
    columns: Tensor = torch.linalg.qr(basis).Q
    return columns[:, 1:].T


def _apply(model: nn.Module, stream: Stream, Q: Tensor) -> None:
    for name in stream.tokens:
        value = model.get_parameter(name)
        value.copy_(value @ Q.T)
    for name, scale in ((stream.embedding, ""), *stream.writers):
        _write(model.get_submodule(name), Q * _gain(model, scale))
    for name, layers in stream.readers:
        norm = model.get_submodule(name)
        gain, offset = norm.get_parameter("weight"), norm.get_parameter("bias")
        for layer in layers:
            reader = model.get_submodule(layer)
            W = reader.get_parameter("weight")
            reader.get_parameter("bias").add_(W @ offset)
            W.copy_((W * gain) @ Q.T)
        gain.fill_(1.0)
        offset.zero_()


def _gain(model: nn.Module, scale: str) -> Tensor:
    """The gain of a LayerScale, which is one afterwards; one where there is none."""
    found = [*(model.get_submodule(scale).parameters() if scale else ())]
    gain = torch.ones(1, dtype=torch.float64) if not found else found[0].detach().clone()
    for parameter in found:
        parameter.fill_(1.0)
    return gain


def _write(writer: nn.Module, Q: Tensor) -> None:
    """Multiply what a linear layer or a convolution gives by Q (D, D)."""
    for parameter in writer.parameters():
        parameter.copy_(
            (Q @ parameter.flatten(1) if parameter.ndim > 1 else Q @ parameter).view_as(parameter)
        )


def _refuse_changed(model: nn.Module, turned: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        before, after = model(images), turned(images)
    change = float((after - before).abs().max() / before.abs().max())
    if not change <= _TOLERANCE:
        raise PruningError(
            f"{type(model).__name__} answers {change:.1e} differently with its residual stream "
            "rotated, so something else writes or reads the stream; leave out --rotate"
        )
