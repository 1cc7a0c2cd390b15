"""From a name, a TOML file or `package.module:function` to a torch model with its weights.

A TOML file says everything at once; paths in it are relative to it:

    [model]
    name = "factory_line"                 # in reports; by default the file's name
    factory = "model.py:create_model"     # or: timm = "deit_small_patch16_224"
    weights = "weights.safetensors"
    [model.arguments]
    num_classes = 9
    [data]
    calibration = "calibration"
    heldout = "heldout"
    labels = ["crack", "ok"]              # in the order of the model's outputs
    [preprocess]
    image_size = 96
"""

import importlib
import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from lpvit_edge.deps import is_mismatched_torchvision, mismatched_torchvision, require
from lpvit_edge.errors import LpvitEdgeError, MissingDependencyError, ModelError
from lpvit_edge.files import sha256_of
from lpvit_edge.images import Preprocess
from lpvit_edge.records import ModelIdentity


class _ModelTable(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str | None = None
    timm: str | None = None
    factory: str | None = None
    weights: str | None = None
    arguments: dict[str, Any] = {}


class _DataTable(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    calibration: str | None = None
    heldout: str | None = None
    labels: tuple[str, ...] | None = None


class _ModelFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: _ModelTable
    data: _DataTable = msgspec.field(default_factory=_DataTable)
    preprocess: Preprocess | None = None


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in evaluation mode, and all that its file says about it."""

    module: nn.Module
    identity: ModelIdentity
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    calibration: Path | None
    heldout: Path | None


def load_model(model: str, *, weights: Path | None = None) -> LoadedModel:
    """Load `model`: a .toml file, "package.module:function", or a timm name.

    Raises ModelError when there is no such file, name or function, when the weights do not fit
    (naming keys and shapes), and MissingDependencyError when torch and torchvision do not match.
    """
    if model.endswith(".toml"):
        path = Path(model)
        file = _read_toml(path)
        name = file.model.name or path.stem
        return _load(file, folder=path.parent, name=name, weights=weights)
    table = _ModelTable(factory=model) if ":" in model else _ModelTable(timm=model)
    return _load(_ModelFile(model=table), folder=Path(), name=model, weights=weights)


def _read_toml(path: Path) -> _ModelFile:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: no such model file; give a .toml file, a timm name such as "
            "deit_small_patch16_224, or package.module:function"
        ) from error
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        return msgspec.convert(toml.loads(text), _ModelFile)
    except (toml.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ModelError(f"{path}: {error}") from error


def _load(file: _ModelFile, *, folder: Path, name: str, weights: Path | None) -> LoadedModel:
    table = file.model
    if (table.timm is None) == (table.factory is None):
        raise ModelError(f"{name}: [model] needs either `timm` or `factory`")
    if table.timm is not None:
        module = _create_timm(table.timm, table.arguments)
    else:
        module = _create_from_factory(str(table.factory), table.arguments, folder=folder)
    source = weights or (folder / table.weights if table.weights else None)
    if source is None:
        raise ModelError(
            f"{name}: no weights given; pruning random weights says nothing about accuracy. "
            "Pass --weights FILE.safetensors"
        )
    _load_weights(module, source)
    preprocess = file.preprocess or _timm_preprocess(module, name)
    identity = ModelIdentity(
        name=name, weights_sha256=sha256_of(source), image_size=preprocess.image_size
    )
    data = file.data
    return LoadedModel(
        module=module.eval(),
        identity=identity,
        preprocess=preprocess,
        labels=data.labels,
        calibration=folder / data.calibration if data.calibration else None,
        heldout=folder / data.heldout if data.heldout else None,
    )


def _create_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    timm = require("timm")
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ModelError(f"timm knows no model {name!r}; near it: {', '.join(close) or 'none'}")
    try:
        module: nn.Module = timm.create_model(name, **arguments)
    except TypeError as error:  # a misspelt key of [model.arguments]
        raise ModelError(f"timm cannot create {name} with {arguments}: {error}") from error
    return module


def _create_from_factory(factory: str, arguments: dict[str, Any], *, folder: Path) -> nn.Module:
    place, _, function_name = factory.partition(":")
    function = _find_function(place, function_name, folder=folder)
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ModelError(
            f"{factory} does not take [model.arguments] {arguments}: {error}"
        ) from error
    try:
        module = function(**arguments)
    except TypeError as error:  # a function with **kwargs takes any name and hands it on
        if not any(repr(name) in str(error) for name in arguments):
            raise
        raise ModelError(
            f"{factory} does not take [model.arguments] {arguments}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{factory} returned {type(module).__name__}, expected a torch nn.Module")
    return module


def _find_function(place: str, name: str, *, folder: Path) -> Callable[..., object]:
    try:
        module = _import_file(folder / place) if place.endswith(".py") else _import_name(place)
    except (ImportError, FileNotFoundError) as error:
        if isinstance(error, LpvitEdgeError):
            raise
        raise ModelError(f"cannot import {place}: {error}") from error
    except RuntimeError as error:  # the user's file imports timm, and timm torchvision
        if not is_mismatched_torchvision(error):
            raise
        raise MissingDependencyError(
            f"cannot import {place}: {error}. {mismatched_torchvision()}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ModelError(f"{place} has no function {name!r}; write factory = 'file.py:function'")
    return function  # type: ignore[no-any-return]


def _import_name(name: str) -> Any:
    with _importable(Path()):  # the `lpvit` script does not look in the working directory
        return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"lpvit_model_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path}: no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    with _importable(path.parent):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's file import its neighbours."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _load_weights(module: nn.Module, path: Path) -> None:
    weights = _read_weights(path)
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    problems = [
        *(f"missing {name} {shape}" for name, shape in expected.items() if name not in found),
        *(f"unexpected {name} {shape}" for name, shape in found.items() if name not in expected),
        *(
            f"{name} is {found[name]} in the file and {shape} in the model"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]
    if problems:
        more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ModelError(
            f"{path}: the weights do not fit the model: {'; '.join(problems[:6])}{more}. "
            "Check the model's name and arguments (num_classes, img_size)"
        )
    module.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors or .pt file; nothing else is ever unpickled."""
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file")
    safetensors = require("safetensors")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, torch.Tensor] = require("safetensors.torch").load_file(path)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
    ) as error:
        raise ModelError(f"{path}: not a file of tensors ({error})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise ModelError(f"{path}: expected a state dict, names with tensors")
    return content


def _timm_preprocess(module: nn.Module, name: str) -> Preprocess:
    """What timm recorded beside the architecture."""
    if getattr(module, "pretrained_cfg", None) is None:
        raise ModelError(
            f"{name}: nothing says how its images are prepared; describe it in a model.toml with a "
            "[preprocess] table (image_size, mean, std) and give that file"
        )
    config = require("timm.data").resolve_data_config({}, model=module)
    return Preprocess(
        image_size=config["input_size"][1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_fraction=config["crop_pct"],
    )
