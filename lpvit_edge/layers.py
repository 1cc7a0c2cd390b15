"""Walk a model: which linear layers can be pruned, what they see, and in which order they run."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lpvit_edge.errors import ModelError
from lpvit_edge.records import LayerShape

# "blocks.3.", "layers.1.blocks.0.", "encoder_layer_5.": an item of a list of blocks.
_LIST_ITEM = re.compile(r"(?:^|[._])\d+$")


class Walk(msgspec.Struct, frozen=True, kw_only=True):
    """The prunable layers in the order in which they run, and the stages they lie in.

    `stages` are the modules through which the hidden state passes one after the other, each
    with the names of its layers: (("blocks.0", ("blocks.0.attn.qkv", ...)), ...). When the model
    is no such chain there is one stage, named "", the whole model.
    """

    layers: tuple[LayerShape, ...]
    stages: tuple[tuple[str, tuple[str, ...]], ...]
    gelu_after: dict[str, str]  # layer -> the nn.GELU module that receives its output
    heads: dict[str, int] = {}  # classifier -> its in_features: what gives the answer


class _Call(msgspec.Struct, kw_only=True):
    name: str
    rows: int
    source: Tensor
    result: Tensor


def walk(model: nn.Module, *, image_size: int) -> Walk:
    """Run one image and two through the model and see what its linear layers receive.

    A layer is prunable when it lies in a list of blocks (`blocks.3...`); in a model without
    such a list, every linear. The one whose output is the model's answer is left out, and so are
    layers that never run, that run several times an image (they cannot be pruned yet), and whose
    rows do not grow with the batch (they work on tables, not on the image).
    """
    single = _linear_calls(model, image_size, batch=1)
    double = _linear_calls(model, image_size, batch=2)
    names = [
        name
        for name, calls in single.items()
        if len(calls) == 1 and _rows(double.get(name)) == 2 * _rows(calls)
    ]
    answering = _answering(model, image_size, single)
    names = [name for name in names if name not in answering]
    prunable = [name for name in names if _in_list(name)] or names
    if not prunable:
        raise ModelError(
            f"{type(model).__name__} has no prunable linear layer; lpvit prunes nn.Linear modules "
            "that run on the image"
        )
    gelu_after = _gelu_after(model, image_size, prunable)
    modules = dict(model.named_modules())
    layers = tuple(
        _shape(name, modules[name], _rows(single[name]), gelu=name in gelu_after)
        for name in prunable
    )
    return Walk(
        layers=layers,
        stages=_stages(model, image_size, prunable),
        gelu_after=gelu_after,
        heads={
            name: calls[0].source.shape[-1] for name, calls in single.items() if name in answering
        },
    )


def _answering(model: nn.Module, image_size: int, calls: dict[str, list[_Call]]) -> set[str]:
    """The classifiers: the last linears that run and give what looks like the answer."""
    with torch.no_grad():
        answer = model(example_images(image_size, batch=1))
    if not isinstance(answer, Tensor):
        raise ModelError(
            f"{type(model).__name__} returns {type(answer).__name__}, expected one tensor of "
            "logits (batch, classes); wrap it in a module that returns them"
        )
    backwards = reversed(list(calls.items()))
    return {
        name
        for name, _ in itertools.takewhile(
            lambda item: item[1][0].result.shape == answer.shape, backwards
        )
    }


def _in_list(name: str) -> bool:
    parts = name.split(".")
    return any(_LIST_ITEM.search(".".join(parts[: end + 1])) for end in range(len(parts)))


def _rows(calls: list[_Call] | None) -> int:
    return sum(call.rows for call in calls or ())


def _shape(name: str, module: nn.Module, rows: int, *, gelu: bool) -> LayerShape:
    assert isinstance(module, nn.Linear)
    return LayerShape(
        name=name,
        tokens=rows,
        in_features=module.in_features,
        out_features=module.out_features,
        activation="gelu" if gelu else "none",
    )


def example_images(image_size: int, *, batch: int) -> Tensor:
    """Images (batch, 3, image_size, image_size) with which a model is traced."""
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def _linear_calls(model: nn.Module, image_size: int, *, batch: int) -> dict[str, list[_Call]]:
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    calls = _record(model, image_size, linears, batch=batch)
    grouped: dict[str, list[_Call]] = {}
    for call in calls:
        grouped.setdefault(call.name, []).append(call)
    return grouped


def _record(model: nn.Module, image_size: int, names: set[str], *, batch: int) -> list[_Call]:
    """Every call of the named modules that takes one tensor and gives one, in order."""
    calls: list[_Call] = []

    def hook(name: str) -> RemovableHandle:
        def record(_: nn.Module, args: tuple[object, ...], result: object) -> None:
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(result, Tensor):
                rows = args[0].numel() // args[0].shape[-1]
                calls.append(_Call(name=name, rows=rows, source=args[0], result=result))

        handle: RemovableHandle = modules[name].register_forward_hook(record)
        return handle

    modules = dict(model.named_modules())
    with hooks(hook(name) for name in names), torch.no_grad():
        model(example_images(image_size, batch=batch))
    return calls


@contextmanager
def hooks(handles: Iterator[RemovableHandle]) -> Iterator[None]:
    """Keep hooks registered for the duration of a block."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def _gelu_after(model: nn.Module, image_size: int, layers: list[str]) -> dict[str, str]:
    """Layers whose output goes, as it is, into an exact nn.GELU and nowhere else we can see."""
    gelus = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.GELU) and module.approximate == "none"
    }
    calls = _record(model, image_size, gelus | set(layers), batch=1)
    shared = {name for name, count in Counter(call.name for call in calls).items() if count > 1}
    by_result = {id(call.result): call.name for call in calls if call.name not in gelus}
    pairs = [(by_result.get(id(call.source)), call.name) for call in calls if call.name in gelus]
    return {layer: gelu for layer, gelu in pairs if layer is not None and gelu not in shared}


def _stages(
    model: nn.Module, image_size: int, layers: list[str]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Group the layers by the block they lie in; one stage when the blocks form no chain."""
    homes = _homes(layers)
    calls = _record(model, image_size, set(homes.values()), batch=1)
    order = [call.name for call in calls]
    chained = all(after.source is before.result for before, after in itertools.pairwise(calls))
    if not chained or sorted(order) != sorted(set(homes.values())):
        return (("", tuple(layers)),)
    return tuple((name, tuple(x for x in layers if homes[x] == name)) for name in order)


def _homes(layers: list[str]) -> dict[str, str]:
    """The innermost list item around each layer, unless that item holds other list items."""
    items = {layer: _list_items(layer) for layer in layers}
    innermost = {found[-1] for found in items.values() if found}
    return {
        layer: found[-1]
        if found and not any(other.startswith(found[-1] + ".") for other in innermost)
        else layer.rpartition(".")[0]
        for layer, found in items.items()
    }


def _list_items(layer: str) -> list[str]:
    parts = layer.split(".")
    prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
    return [prefix for prefix in prefixes if _LIST_ITEM.search(prefix)]
