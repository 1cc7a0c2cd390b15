"""A device that no machine has, so that what mixes devices is found without one.

Tensors on it say `device == DEVICE`. They compute on the processor, and refuse, as torch does on a
GPU, to meet tensors that lie on the processor; only numbers (tensors without dimensions) and copies
go across. Index tensors, which torch would carry over by itself, are refused too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")

_CROSSING = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}


class There(Tensor):
    """A tensor on DEVICE; `held` are its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def fake_device() -> Iterator[None]:
    """While it is entered, tensors can be made on DEVICE and moved to it."""
    with _Factories(), _Operators():  # type: ignore[no-untyped-call]
        yield


class _Factories(TorchFunctionMode):
    """What crosses to the device or back where no dispatch mode sees it."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.tolist:
            return _held(args[0]).tolist()
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, those that make a tensor from none included."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    found = [x for x in tensors if isinstance(x, There)]
    if found and func not in _CROSSING and any(_on_cpu(x) for x in tensors):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! (when checking arguments for {func})"
        )
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(_held, (args, kwargs))
    result = func(*args, **kwargs)
    if func._schema.name.endswith("_"):
        return tensors[0]
    there = bool(found) if asked is None else torch.device(asked).type == DEVICE.type
    return tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, result) if there else result


def _on_cpu(x: Tensor) -> bool:
    return not isinstance(x, There) and x.ndim > 0


def _held(x: Any) -> Any:
    return x.held if isinstance(x, There) else x
