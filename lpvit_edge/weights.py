"""All tensors of a model as one safetensors file."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge import files
from lpvit_edge.deps import require

if TYPE_CHECKING:
    from torch import Tensor, nn


def save(model: "nn.Module", path: Path) -> None:
    """Write all tensors of a model, on whatever device, whole or not at all."""
    save_file = require("safetensors.torch").save_file
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    files.replace_atomic(path, lambda temporary: save_file(state, temporary))


def load(path: Path) -> "dict[str, Tensor]":
    """The tensors of a file."""
    tensors: dict[str, Tensor] = require("safetensors.torch").load_file(path)
    return tensors


def filled(model: "nn.Module", tensors: "Mapping[str, Tensor]") -> "nn.Module":
    """A copy of the model with these tensors."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(tensors)
    return copied
