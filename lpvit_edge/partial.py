"""The layers that an interrupted pruning has finished, so that the next one goes on behind them.

One safetensors file a layer, each tied by a digest to what it was made from: the
model, the allocation, the images and the settings. What was made from anything else is not used.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
from torch import Tensor, nn

from lpvit_edge import files
from lpvit_edge.deps import require
from lpvit_edge.errors import FileFormatError
from lpvit_edge.prune import DoneLayer, Settings
from lpvit_edge.records import ModelIdentity, PrunedLayer

FORMAT = "1"


def made_from(
    model: ModelIdentity,
    *,
    allocation_sha256: str,
    images_sha256: str,
    settings: Settings,
    weighed: bool,
) -> str:
    """Digest of everything that decides what pruning makes of a layer."""
    parts = (FORMAT, model, allocation_sha256, images_sha256, settings, weighed)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def keep(folder: Path, entry: PrunedLayer, model: nn.Module, *, digest: str) -> None:
    """Write one pruned layer of `model`; the file is whole or absent."""
    layer = model.get_submodule(entry.layer)
    tensors: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous() for name, value in layer.named_parameters()
    }
    metadata = {"made_from": digest, "entry": msgspec.json.encode(entry).decode()}
    save_file = require("safetensors.torch").save_file
    files.replace_atomic(
        folder / f"{entry.layer}.safetensors",
        lambda temporary: save_file(tensors, temporary, metadata=metadata),
    )


def kept(folder: Path, *, digest: str) -> dict[str, DoneLayer]:
    """The layers of a folder that were made from the same; none where there is no folder."""
    found = (_read(path, digest) for path in sorted(folder.glob("*.safetensors")))
    return {layer.entry.layer: layer for layer in found if layer is not None}


def _read(path: Path, digest: str) -> DoneLayer | None:
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("made_from") != digest:
                return None
            entry = msgspec.json.decode(metadata["entry"], type=PrunedLayer)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        return DoneLayer(entry=entry, weight=tensors["weight"], bias=tensors.get("bias"))
    except (msgspec.DecodeError, KeyError, safetensors.SafetensorError) as error:
        raise FileFormatError(
            f"{path}: not a pruned layer ({error}); delete the folder {path.parent} and prune again"
        ) from error


def clear(folder: Path) -> None:
    """Remove what is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)


def keeping(
    steps: Iterator[tuple[PrunedLayer, nn.Module]], folder: Path, *, digest: str
) -> Iterator[tuple[PrunedLayer, nn.Module]]:
    """Pass on what prune() yields, each layer once it is on disk."""
    for entry, model in steps:
        keep(folder, entry, model, digest=digest)
        yield entry, model
