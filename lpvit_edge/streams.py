"""Where the residual streams of a model run: what writes them and what reads them.

A Vision Transformer of timm has one stream, a Swin one for each stage. Names are timm's.
"""

from collections.abc import Iterator

import msgspec
from torch import nn

from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk

# norm, the layer that reads it, the layer that writes what comes of it, LayerScale
_BRANCHES = (("norm1", "attn.qkv", "attn.proj", "ls1"), ("norm2", "mlp.fc1", "mlp.fc2", "ls2"))


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """What writes and what reads one residual stream."""

    width: int
    tokens: tuple[str, ...]  # parameters of the model itself: class token, positions
    opening: str  # the layer that opens it: a patch embedding, or the merging of patches
    writers: tuple[tuple[str, str | None], ...]  # linear layer, and the LayerScale behind it
    readers: tuple[tuple[str, tuple[str, ...]], ...]  # LayerNorm, and the linear layers behind it


def find_streams(model: nn.Module, walk: Walk) -> tuple[Stream, ...]:
    """The streams of a model that any basis suits. Raises PruningError when there is none."""
    try:
        streams = tuple(_swin(model, walk) if hasattr(model, "layers") else _vit(model, walk))
    except (AttributeError, IndexError, ValueError) as error:
        raise PruningError(
            f"{type(model).__name__} is not built like timm's Vision Transformers and Swins, a "
            f"LayerNorm before each branch ({error})"
        ) from error
    if not streams:
        raise PruningError(
            f"a LayerNorm opens the only residual stream of {type(model).__name__}, and its gain "
            "belongs to the basis that is there"
        )
    return streams


def _vit(model: nn.Module, walk: Walk) -> Iterator[Stream]:
    last = "norm" if isinstance(model.get_submodule("norm"), nn.LayerNorm) else "fc_norm"
    if not (_is_norm(model, "patch_embed.norm") or _is_norm(model, "norm_pre")):
        yield _stream(model, "blocks", "patch_embed.proj", (last, tuple(walk.heads)))


def _swin(model: nn.Module, walk: Walk) -> Iterator[Stream]:
    stages = [f"layers.{name}" for name, _ in model.get_submodule("layers").named_children()]
    closings = [
        *((f"{stage}.downsample.norm", (f"{stage}.downsample.reduction",)) for stage in stages[1:]),
        ("norm", tuple(walk.heads)),
    ]
    for stage, closing in zip(stages, closings, strict=True):
        if stage != stages[0]:
            yield _stream(model, f"{stage}.blocks", f"{stage}.downsample.reduction", closing)
        elif not _is_norm(model, "patch_embed.norm"):
            yield _stream(model, f"{stage}.blocks", "patch_embed.proj", closing)


def _stream(
    model: nn.Module, blocks: str, opening: str, closing: tuple[str, tuple[str, ...]]
) -> Stream:
    """The stream through a list of blocks; AttributeError, IndexError, ValueError: not so."""
    found = [f"{blocks}.{name}" for name, _ in model.get_submodule(blocks).named_children()]
    branches = [(block, *branch) for block in found for branch in _BRANCHES]
    width = model.get_submodule(f"{found[0]}.norm1").get_parameter("weight").numel()
    stream = Stream(
        width=width,
        tokens=tuple(
            name
            for name, value in model.named_parameters(recurse=False)
            if value.shape[-1:] == (width,) and opening.startswith("patch_embed")
        ),
        opening=opening,
        writers=tuple(
            (f"{block}.{writer}", _there(model, f"{block}.{scale}"))
            for block, _, _, writer, scale in branches
        ),
        readers=(
            *(
                (f"{block}.{norm}", (f"{block}.{reader}",))
                for block, norm, reader, _, _ in branches
            ),
            closing,
        ),
    )
    _refuse_misfits(model, stream)
    return stream


def _refuse_misfits(model: nn.Module, stream: Stream) -> None:
    """Raise ValueError where a layer is not as wide as what it writes or reads."""
    for name in (stream.opening, *(writer for writer, _ in stream.writers)):
        written = len(model.get_submodule(name).get_parameter("weight"))
        if written != stream.width:
            raise ValueError(f"{name} gives {written} channels, not {stream.width}")
    for norm, layers in stream.readers:
        normed = model.get_submodule(norm).get_parameter("bias").numel()
        read = {model.get_submodule(layer).get_parameter("weight").shape[1] for layer in layers}
        if normed % stream.width or read - {normed}:
            raise ValueError(f"{norm} gives {normed} channels and {layers} take {sorted(read)}")


def _there(model: nn.Module, name: str) -> str | None:
    """The name, where the model has such a module."""
    return name if any(name == found for found, _ in model.named_modules()) else None


def _is_norm(model: nn.Module, name: str) -> bool:
    return isinstance(dict(model.named_modules()).get(name), nn.LayerNorm)
