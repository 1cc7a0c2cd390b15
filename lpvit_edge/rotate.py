"""Rotate the residual streams, so that whole blocks of the weights beside them carry little.

A residual stream is written by the embedding and by the last layer of each branch, and read through
LayerNorms. A LayerNorm whose gain lies in the layers that read it commutes with every orthogonal Q
that keeps the vector of ones, for such a Q keeps the mean and the variance over the channels. So
each writer may be multiplied by Q and each reader by Q^T: another basis of the stream, the same
function, the same graph. SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024) rotates networks with
RMSNorm; keeping the ones, and with them LayerNorm, is our own.

Q brings the principal directions of what the layers read, the strongest first, into groups of
neighbouring channels. The stream has a far lower rank than it is wide, so most inputs of its
readers and most outputs of its writers are then nearly zero, in neighbouring rows and columns.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_edge.distributed import add_up, from_main, share
from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk, hooks
from lpvit_edge.prune_refusals import refuse_broken_weights
from lpvit_edge.streams import Stream, find_streams

_GROUP = 16  # channels, of which most blocks span a multiple or a fraction
_BATCH = 32  # images of one forward pass
_TOLERANCE = 1e-5  # of the largest answer; float32 in another basis differs by 1e-6


def rotated(model: nn.Module, walk: Walk, images: Tensor) -> nn.Module:
    """A copy of the model with the same answers, its streams in bases that suit blocks.

    images (n, 3, S, S), normalized, for calibration, on the model's device. Raises PruningError
    when the model is not built like timm's Vision Transformers and Swins, holds NaN or Inf, or
    answers differently afterwards.
    """
    refuse_broken_weights(model)
    streams = find_streams(model, walk)
    moments = _read(model, streams, images)
    turned = copy.deepcopy(model).cpu().double()
    for stream in streams:
        C = torch.stack([moments[norm] for norm, _ in stream.readers]).sum(0)
        Q = from_main(rotation(C, group=math.gcd(_GROUP, stream.width)))
        with torch.no_grad():
            _apply(turned, stream, Q)
    turned = turned.to(images.device, torch.float32).eval()
    _refuse_changed(model, turned, images[:4])
    return turned


def _read(model: nn.Module, streams: tuple[Stream, ...], images: Tensor) -> dict[str, Tensor]:
    """What the readers read: for each LayerNorm its output's second moments (D, D), of trace one.

    Patches that were merged count each by itself. Raises PruningError, naming the LayerNorm, where
    a moment is not finite.
    """
    widths = {norm: stream.width for stream in streams for norm, _ in stream.readers}
    moments = {name: torch.zeros(D, D).double() for name, D in widths.items()}

    def keep(name: str, D: int) -> RemovableHandle:
        def hook(_: nn.Module, __: tuple[Tensor, ...], y: Tensor) -> None:
            flat = y.reshape(-1, D)
            moments[name] += (flat.T @ flat).cpu()

        return model.get_submodule(name).register_forward_hook(hook)

    with hooks(keep(name, D) for name, D in widths.items()), torch.no_grad():
        for start in share(range(0, len(images), _BATCH)):
            model(images[start : start + _BATCH])
    add_up(*moments.values())
    for name, C in moments.items():
        if not bool(C.isfinite().all()):
            raise PruningError(
                f"{name}: what it gives on the calibration images holds NaN or infinity; check the "
                "images and the weights"
            )
        C /= C.trace().clamp_min(torch.finfo(C.dtype).tiny)  # one that gives nothing counts none
    return moments


def rotation(C: Tensor, *, group: int) -> Tensor:
    """Q (D, D), orthogonal, Q 1 = 1: eigenvectors of C (D, D) into groups of channels.

    Inside each group of `group` channels lie group - 1 directions without a mean, in all the
    strongest D - D / group; the weakest become the differences between the groups' means. A group
    of 1 is the same as one of D.
    """
    D = len(C)
    ones = torch.full((D,), D**-0.5, dtype=C.dtype)
    H = _contrasts(D).T
    V = H @ torch.linalg.eigh(H.T @ C @ H).eigenvectors.flip(1)
    V = V * V.gather(0, V.abs().argmax(0, keepdim=True)).sign()  # or rounding chooses the signs
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
    for name, scale in ((stream.opening, None), *stream.writers):
        _turn_writer(model.get_submodule(name), Q * _gain(model, scale))
    for name, layers in stream.readers:
        _turn_readers(model.get_submodule(name), [model.get_submodule(x) for x in layers], Q)


def _gain(model: nn.Module, scale: str | None) -> Tensor:
    """The gain of a LayerScale, which is one afterwards; one where there is none."""
    found = [] if scale is None else [*model.get_submodule(scale).parameters()]
    gain = torch.ones(1, dtype=torch.float64) if not found else found[0].detach().clone()
    for parameter in found:
        parameter.fill_(1.0)
    return gain


def _turn_writer(writer: nn.Module, Q: Tensor) -> None:
    """Multiply what a linear layer or a convolution gives by Q (D, D)."""
    for parameter in writer.parameters():
        parameter.copy_(
            (Q @ parameter.flatten(1) if parameter.ndim > 1 else Q @ parameter).view_as(parameter)
        )


def _turn_readers(norm: nn.Module, readers: list[nn.Module], Q: Tensor) -> None:
    """Move a LayerNorm's gain and offset into its readers, which read Q x from now on.

    Readers of merged patches read several pieces of the stream side by side. Where one has no bias
    to take what the offset gives, the offset stays: the least one that gives the same.
    """
    gain, offset = norm.get_parameter("weight"), norm.get_parameter("bias")
    weights = [reader.get_parameter("weight") for reader in readers]
    given = [W @ offset for W in weights]
    for W in weights:
        W.copy_(((W * gain).reshape(len(W), -1, len(Q)) @ Q.T).flatten(1))
    bare = [i for i, reader in enumerate(readers) if getattr(reader, "bias", None) is None]
    gain.fill_(1.0)
    offset.zero_()
    if bare:
        both = torch.cat([weights[i] for i in bare]), torch.cat([given[i] for i in bare])[:, None]
        offset.copy_(torch.linalg.lstsq(*both, driver="gelsd").solution[:, 0])
    for i, reader in enumerate(readers):
        if i not in bare:
            reader.get_parameter("bias").add_(given[i] - weights[i] @ offset)


def _refuse_changed(model: nn.Module, turned: nn.Module, images: Tensor) -> None:
    """Raise PruningError, in all processes or in none, unless the answers stay what they were."""
    with torch.no_grad():
        before, after = model(images), turned(images)
    found = torch.stack([before.abs().max(), (after - before).abs().max()])
    largest, change = from_main(found).tolist()
    if largest == 0.0:
        raise PruningError(
            f"{type(model).__name__} answers nothing but 0 to the calibration images, which could "
            "not show whether a rotation keeps its answers"
        )
    if not change <= _TOLERANCE * largest:
        raise PruningError(
            f"{type(model).__name__} answers {change / largest:.1e} differently with its residual "
            "streams rotated, so something else writes or reads them"
        )
