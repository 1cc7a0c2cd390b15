"""Let a pruned model's norms and biases follow the dense model's answers, without labels.

The closed-form repair makes each layer's output right; what is left adds up along the network. A
few hundred steps on the calibration images move the parameters of LayerNorms and the biases of
linear layers, and no weight matrix, so that the masks cannot change. Tuning these few parameters
alone is enough to adapt a Transformer (BitFit, Ben Zaken et al. 2022, arXiv 2106.10199); matching
the dense answers rather than labels is distillation (Hinton et al. 2015, arXiv 1503.02531).

Of the images one in four is kept apart. The loss on these decides which of the states on the way is
kept, the first one, in which nothing has moved, included.
"""

import copy
import math
import time
from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from lpvit_edge.errors import PruningError
from lpvit_edge.layers import Walk, hooks
from lpvit_edge.matching import Matching
from lpvit_edge.progress import track

_APART = 4  # one image in so many is kept apart


class Matched(msgspec.Struct, frozen=True, kw_only=True):
    """A model whose outputs were matched, and what that did; see lpvit_edge.matching.MatchLog."""

    model: nn.Module
    kept_step: int
    parameters: int
    images: int
    images_apart: int
    loss_before: float
    loss_after: float
    seconds: float


def match_outputs(
    dense: nn.Module,
    pruned: nn.Module,
    walk: Walk,
    images: Tensor,
    *,
    settings: Matching | None = None,
) -> Matched:
    """A copy of `pruned` whose LayerNorms and biases match the dense answers better, and how much.

    images (n, 3, S, S), normalized, on the models' device. Raises PruningError when there are fewer
    than 8 images, when nothing can move, or when the loss is not finite.
    """
    settings = settings or Matching()
    started = time.perf_counter()
    if len(images) < 2 * _APART:
        raise PruningError(
            f"{len(images)} calibration images are too few to match outputs on; give {2 * _APART}"
        )
    model = copy.deepcopy(pruned)
    moving = _moving(model)
    if not moving:
        raise PruningError(
            f"{type(model).__name__} has no LayerNorm and no bias; outputs cannot be matched"
        )
    apart = torch.arange(len(images), device=images.device) % _APART == _APART - 1
    goal = _Answers.of(dense, walk, images, size=settings.batch)
    best, first = copy.deepcopy(moving), _judge(model, walk, images, goal, apart, settings.batch)
    lowest, best_step = first, 0
    order = _order(torch.nonzero(~apart)[:, 0], settings)
    for step, loss in _steps(model, walk, images, goal, order, moving, settings):
        if not math.isfinite(loss):
            raise PruningError(f"matching outputs diverged in step {step}; use a lower rate")
        if step % settings.judge_every and step != settings.steps:
            continue
        found = _judge(model, walk, images, goal, apart, settings.batch)
        if found < lowest:
            lowest, best_step, best = found, step, copy.deepcopy(moving)
    with torch.no_grad():
        for name, value in best.items():
            moving[name].copy_(value)
    refuse_moved(pruned, model, moving)
    return Matched(
        model=model.requires_grad_(False),
        kept_step=best_step,
        parameters=sum(parameter.numel() for parameter in moving.values()),
        images=int((~apart).sum()),
        images_apart=int(apart.sum()),
        loss_before=first,
        loss_after=lowest,
        seconds=time.perf_counter() - started,
    )


def _moving(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of LayerNorms and biases of linear layers; everything else is frozen."""
    model.eval().requires_grad_(False)
    found = {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or (isinstance(module, nn.Linear) and own == "bias")
    }
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


class _Answers(msgspec.Struct, kw_only=True):
    """What a model gives for images."""

    logits: Tensor  # (n, classes)
    features: Tensor | None  # (n, ...) what its classifier reads, where it has one

    @classmethod
    def of(cls, model: nn.Module, walk: Walk, images: Tensor, *, size: int) -> "_Answers":
        with torch.no_grad():
            parts = [answers(model, walk, part) for part in images.split(size)]  # type: ignore[no-untyped-call]
        features = [part.features for part in parts if part.features is not None]
        return cls(
            logits=torch.cat([part.logits for part in parts]),
            features=torch.cat(features) if features else None,
        )

    def at(self, index: Tensor) -> "_Answers":
        """Those of some images."""
        features = None if self.features is None else self.features[index]
        return _Answers(logits=self.logits[index], features=features)


def answers(model: nn.Module, walk: Walk, images: Tensor) -> _Answers:
    """Logits, and what the first of the classifiers reads."""
    seen: list[Tensor] = []
    heads = [model.get_submodule(name) for name in list(walk.heads)[:1]]
    registered = (
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for head in heads
    )
    with hooks(iter(registered)):
        logits = model(images)
    return _Answers(logits=logits, features=seen[0] if seen else None)


def distance(found: _Answers, goal: _Answers) -> Tensor:
    """KL(dense || pruned) of the answers, and the squared error of the features, relative.

    Mean over images; what is no distribution over classes (more than two dimensions) is compared
    by its squared error too.
    """
    if goal.logits.ndim == 2 and goal.logits.shape[1] > 1:
        log_p, log_q = goal.logits.log_softmax(1), found.logits.log_softmax(1)
        total = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    else:
        total = _relative(found.logits, goal.logits)
    if found.features is not None and goal.features is not None:
        total = total + _relative(found.features, goal.features)
    return total


def _relative(found: Tensor, goal: Tensor) -> Tensor:
    return (found - goal).square().sum() / goal.square().sum().clamp(min=1e-12)


def _judge(
    model: nn.Module, walk: Walk, images: Tensor, goal: _Answers, apart: Tensor, size: int
) -> float:
    index = torch.nonzero(apart)[:, 0]
    found = _Answers.of(model, walk, images[index], size=size)
    return float(distance(found, goal.at(index)))


def _order(indices: Tensor, settings: Matching) -> Iterator[Tensor]:
    """Batches of indices, pass after pass in another order."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(len(indices), generator=generator)
        shuffled = indices[order.to(indices.device)]
        yield from shuffled.split(settings.batch)  # type: ignore[no-untyped-call]


def _steps(
    model: nn.Module,
    walk: Walk,
    images: Tensor,
    goal: _Answers,
    order: Iterator[Tensor],
    moving: dict[str, nn.Parameter],
    settings: Matching,
) -> Iterator[tuple[int, float]]:
    optimizer = torch.optim.Adam(moving.values(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps)
    numbers = range(1, settings.steps + 1)
    for step in track(numbers, what="match outputs: steps", total=settings.steps):
        index = next(order)
        with torch.enable_grad():
            loss = distance(answers(model, walk, images[index]), goal.at(index))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        yield step, float(loss.detach())


def refuse_moved(before: nn.Module, after: nn.Module, moving: dict[str, nn.Parameter]) -> None:
    """Raise PruningError when anything but the moving parameters has changed."""
    state = after.state_dict()
    changed = [
        name
        for name, value in before.state_dict().items()
        if name not in moving and not torch.equal(value, state[name])
    ]
    if changed:
        raise PruningError(
            f"matching outputs changed {', '.join(changed[:5])}, which must stay; report this"
        )
