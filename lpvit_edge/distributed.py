"""Several processes as one: who takes which part, and how the parts are added up.

Processes come from `accelerate launch` or torchrun, which tell each one its RANK and the
WORLD_SIZE. Without them there is one process, and everything here does nothing. All processes go
through the same steps with the same sums; only the first one writes files and draws bars.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from lpvit_edge.errors import DataError, UnknownOptionError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items: neighbours, the first process has the first ones."""
    bounds = [len(items) * index // size() for index in (rank(), rank() + 1)]
    return items[bounds[0] : bounds[1]]


def first_of(count: int) -> int:
    """The place of this process's first item among all, when each has `count` of its own."""
    import torch

    counts = torch.zeros(size(), dtype=torch.int64)
    counts[rank()] = count
    add_up(counts)
    return int(counts[: rank()].sum())


def refuse_idle(batches: int) -> None:
    """Raise DataError when there are fewer batches than processes: one would have no image."""
    if batches < size():
        raise DataError(
            f"{batches} batches of calibration images for {size()} processes; start fewer "
            "processes, or give more --images"
        )


def add_up(*tensors: "torch.Tensor") -> None:
    """Replace each tensor by its sum over all processes, in place and alike in all of them."""
    if size() == 1:
        return
    from torch import distributed

    for tensor in tensors:
        own = tensor.cpu().contiguous()
        distributed.all_reduce(own, group=_group())
        tensor.copy_(own)


def from_main(tensor: "torch.Tensor") -> "torch.Tensor":
    """The first process's tensor, in all of them; shape and type must agree."""
    if size() == 1:
        return tensor
    from torch import distributed

    own = tensor.cpu().contiguous()
    distributed.broadcast(own, src=0, group=_group())
    return own.to(tensor.device)


def wait() -> None:
    """Go on when all processes have come here: what the first one wrote is then there."""
    if size() > 1:
        from torch import distributed

        distributed.barrier(group=_group())


def leave() -> None:
    """Part from the other processes, at the end."""
    if size() > 1 and _group.cache_info().currsize:
        from torch import distributed

        distributed.destroy_process_group()
        _group.cache_clear()


def refuse_many(verb: str) -> None:
    """Raise UnknownOptionError where several processes would disturb each other's measurement."""
    if size() > 1:
        raise UnknownOptionError(
            f"lpvit {verb} measures this machine and runs in one process; several may share "
            "lpvit sensitivity, prune and finetune"
        )


@cache
def _group() -> Any:
    """Gloo over all processes: it adds tensors up in the same order everywhere, on CPUs."""
    import torch

    from lpvit_edge.deps import require

    require("accelerate").PartialState(cpu=not torch.cuda.is_available())
    return torch.distributed.new_group(backend="gloo")
