"""Reorder what may be reordered without changing the function, so that blocks cost less.

Neurons of an MLP may change places when the rows of its first layer and the columns of its second
do so together; so may the channels of the values inside one head, with the columns of the
projection. Rows that need the same inputs are brought into one block row, and inside it columns
that the same rows of the next layer need into one block column. For 2:4 the other way about: what
a row needs is spread over its groups of four, see lpvit_edge.spread.

Which layers feed each other is not read off their names: two layers that run one after the other
are reordered at random, and they are a pair only when the second one's output and the whole
stage's stay what they were.

The saliency of a weight is its OBS cost w_ij^2 / [A^-1]_jj (Hassibi & Stork 1993, eq. 5).
Reordering channels for sparsity was shown for 2:4 by Pool & Yu 2021 (NeurIPS, "Channel permutations
for N:M sparsity"); grouping rows by alternating between masks and members is our own choice.
"""

import itertools
from collections.abc import Callable, Mapping

import msgspec
import torch
from torch import Tensor, nn

from lpvit_edge.distributed import add_up, first_of, from_main
from lpvit_edge.layers import hooks
from lpvit_edge.pattern import Pattern
from lpvit_edge.repair import DAMPING, about_layer, cholesky, refuse_unfit
from lpvit_edge.solve import Form
from lpvit_edge.spread import spread
from lpvit_edge.statistics import gram, stage_pass

_TOLERANCE = 1e-4  # of the largest output: what float32 sums in another order may differ
_ROUNDS = 12
_TOKENS_PER_INPUT = 4  # tokens for each input column from which saliencies are taken


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """Two layers between which channels may change places, inside segments of equal size."""

    first: str  # its last `channels` rows are the channels
    second: str  # its columns
    channels: int
    segment: int  # channels never leave their segment: a head, or all of them


def find_pairs(model: nn.Module, stage: str, names: tuple[str, ...], x: Tensor) -> tuple[Pair, ...]:
    """The pairs among the layers of one stage; x is a small input of the stage.

    The model's weights are moved and moved back.
    """
    module = model.get_submodule(stage)
    candidates = (
        pair for a, b in itertools.pairwise(names) if (pair := _candidate(model, a, b)) is not None
    )
    return tuple(pair for pair in candidates if _keeps_function(model, module, pair, x))


def _candidate(model: nn.Module, first: str, second: str) -> Pair | None:
    a, b = _linear(model, first), _linear(model, second)
    heads = getattr(model.get_submodule(second.rpartition(".")[0]), "num_heads", 1)
    if not isinstance(heads, int) or heads < 1 or b.in_features % heads:
        return None
    if a.out_features not in (b.in_features, 3 * b.in_features):
        return None
    segment = b.in_features // heads
    return Pair(first=first, second=second, channels=b.in_features, segment=segment)


def _keeps_function(model: nn.Module, stage: nn.Module, pair: Pair, x: Tensor) -> bool:
    before = _outputs(stage, _linear(model, pair.second), x)
    generator = torch.Generator().manual_seed(0)
    segments = torch.arange(pair.channels).split(pair.segment)  # type: ignore[no-untyped-call]
    order = torch.cat([s[torch.randperm(len(s), generator=generator)] for s in segments])
    reorder(model, pair, order)
    after = _outputs(stage, _linear(model, pair.second), x)
    reorder(model, pair, order.argsort())
    return all(
        float((old - new).abs().max()) <= _TOLERANCE * float(old.abs().max())
        for old, new in zip(before, after, strict=True)
    )


def _outputs(stage: nn.Module, layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the layer and the stage answer to x."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], answer: Tensor) -> None:
        seen.append(answer)

    with hooks(iter([layer.register_forward_hook(keep)])), torch.no_grad():
        result: Tensor = stage(x)
    return seen[0], result


def reorder(model: nn.Module, pair: Pair, order: Tensor) -> None:
    """Put channel order[i] of a pair in place i, in place in the model's weights."""
    first, second = _linear(model, pair.first), _linear(model, pair.second)
    fixed = first.out_features - pair.channels
    order = order.to(first.weight.device)
    rows = torch.cat([torch.arange(fixed, device=order.device), fixed + order])
    with torch.no_grad():
        first.weight.copy_(first.weight[rows])
        if first.bias is not None:
            first.bias.copy_(first.bias[rows])
        second.weight.copy_(second.weight[:, order])


def reorder_stage(
    models: tuple[nn.Module, ...],
    stage: str,
    names: tuple[str, ...],
    forms: Mapping[str, Form],
    batches: list[Tensor],
) -> tuple[Pair, ...]:
    """Reorder one stage of several copies of a model in the same way; returns what was reordered.

    batches: inputs of the stage in the first of the models, which is the dense one.
    """
    dense = models[0]
    pairs = [
        pair
        for pair in find_pairs(dense, stage, names, batches[0][:2])
        if _gains(pair, forms.get(pair.first, Form()), forms.get(pair.second, Form()))
    ]
    wanted = {name: _linear(dense, name) for pair in pairs for name in (pair.first, pair.second)}
    saliencies = _saliencies(dense.get_submodule(stage), wanted, batches)
    for pair in pairs:
        order = choose_order(
            pair,
            saliencies[pair.first][-pair.channels :],
            saliencies[pair.second],
            forms.get(pair.first, Form()),
            forms.get(pair.second, Form()),
        )
        order = from_main(order)  # of several processes each has seen other images
        for model in models:
            reorder(model, pair, order)
    return tuple(pairs)


def _blocks(form: Form) -> Pattern | None:
    return form.pattern if form.pattern.kind == "block" and form.sparsity > 0.0 else None


def _gains(pair: Pair, first: Form, second: Form) -> bool:
    a, b = _blocks(first), _blocks(second)
    by_rows = a is not None and 1 < a.rows < pair.segment and pair.segment % a.rows == 0
    by_columns = b is not None and 1 < b.cols < pair.segment and pair.segment % b.cols == 0
    return by_rows or by_columns or _spreads(second, pair.segment)


def _spreads(second: Form, segment: int) -> bool:
    """Whether the columns of a layer in 2:4 have another group of four to go to."""
    two_four = second.pattern.kind == "2:4" and second.sparsity > 0.0
    return two_four and segment > 4 and segment % 4 == 0


def _saliencies(
    stage: nn.Module, layers: Mapping[str, nn.Linear], batches: list[Tensor]
) -> dict[str, Tensor]:
    """w_ij^2 / [A^-1]_jj for each weight (N, K) of each layer, A over as many tokens as it needs.

    Several processes take those of the wanted batches that are theirs, and add up.
    """
    if not layers:
        return {}
    first, _ = stage_pass(stage, layers, batches[:1])
    wanted = _batches_wanted(layers, {name: len(x) for name, (x,) in first.items()})
    K = {name: layer.in_features for name, layer in layers.items()}
    A = {name: x.weight.new_zeros(K[name], K[name]).double() for name, x in layers.items()}
    tokens = dict.fromkeys(layers, 0)
    for batch in batches[: max(0, wanted - first_of(len(batches)))]:
        for name, (x,) in stage_pass(stage, layers, [batch])[0].items():
            A[name] += gram(x)
            tokens[name] += len(x)
    counts = torch.tensor([tokens[name] for name in layers])
    add_up(*A.values(), counts)
    return {
        name: _saliency(name, layer, A[name] / int(count))
        for (name, layer), count in zip(layers.items(), counts, strict=True)
    }


def _batches_wanted(layers: Mapping[str, nn.Linear], rows: Mapping[str, int]) -> int:
    """How many batches give every layer its tokens, as the first process sees it."""
    need = max(_TOKENS_PER_INPUT * layer.in_features for layer in layers.values())
    return int(from_main(torch.tensor(max(-(-need // count) for count in rows.values()))))


def _saliency(name: str, layer: nn.Linear, upper: Tensor) -> Tensor:
    A = upper.triu() + upper.triu(1).T
    A.diagonal().add_(DAMPING * float(A.diagonal().mean()))
    with about_layer(name):
        refuse_unfit(A)
        inverse = torch.cholesky_inverse(cholesky(A))
    return layer.weight.detach().square() / inverse.diagonal().float()


def choose_order(pair: Pair, rows: Tensor, columns: Tensor, first: Form, second: Form) -> Tensor:
    """The order (channels,) in which the blocks of two layers cost least.

    rows (channels, K) are saliencies of the first layer's rows, columns (N, channels) of the
    second layer's columns.
    """
    a, b = _blocks(first), _blocks(second)
    order, segment = torch.arange(pair.channels, device=rows.device), pair.segment
    if a is not None and 1 < a.rows < segment and segment % a.rows == 0:
        by_block = rows.reshape(len(rows), -1, a.cols).sum(2)
        order = _within(order, segment, by_block, size=a.rows, keep=1.0 - first.sparsity)
        segment = a.rows
    if b is not None and 1 < b.cols < segment and segment % b.cols == 0:
        by_block = columns.reshape(-1, b.rows, columns.shape[1]).sum(1).T
        order = _within(order, segment, by_block, size=b.cols, keep=1.0 - second.sparsity)
    elif _spreads(second, segment):
        parts = order.reshape(-1, segment)
        order = torch.cat([part[spread(columns[:, part])] for part in parts])
    return order


def _within(order: Tensor, segment: int, saliency: Tensor, *, size: int, keep: float) -> Tensor:
    """Reorder each segment of `order` so that groups of `size` neighbours agree."""
    parts = order.reshape(-1, segment)
    return torch.cat([part[grouped(saliency[part], size=size, keep=keep)] for part in parts])


def grouped(saliency: Tensor, *, size: int, keep: float) -> Tensor:
    """An order of the rows in which groups of `size` lose little when each drops columns.

    saliency (n, m) of n rows in m columns. Each group drops the columns in which its rows together
    have least, in all a share 1 - keep. Masks and members are chosen in turns, each best for the
    other, from the order as it is and from one by the strongest column; the better end counts, and
    the order stays when neither is better.
    """
    n, m = saliency.shape
    groups = n // size
    drop = round((1.0 - keep) * groups * m)
    stay = torch.arange(n, device=saliency.device)

    def masks(order: Tensor) -> tuple[Tensor, float]:
        totals = saliency[order].reshape(groups, size, m).sum(1)
        ranked = totals.flatten().argsort(stable=True)
        mask = torch.ones(groups * m, device=saliency.device)
        mask[ranked[:drop]] = 0.0
        return mask.reshape(groups, m), float((totals.flatten() * mask).sum(dtype=torch.float64))

    starts = (stay, saliency.argmax(1).argsort(stable=True))
    best = max((_alternate(start, saliency, size, masks) for start in starts), key=lambda e: e[0])
    return best[1] if best[0] > masks(stay)[1] else stay


def _alternate(
    order: Tensor, saliency: Tensor, size: int, masks: Callable[[Tensor], tuple[Tensor, float]]
) -> tuple[float, Tensor]:
    mask, kept = masks(order)
    best = (kept, order)
    for _ in range(_ROUNDS):
        order = _members(saliency @ mask.T, size).argsort(stable=True)
        mask, kept = masks(order)
        if kept <= best[0]:
            break
        best = (kept, order)
    return best


def _members(gain: Tensor, size: int) -> Tensor:
    """The group of each row (n,), `size` rows a group; gain (n, groups) is what a row keeps there.

    Each row asks for its best open group; a group takes those that would lose most elsewhere.
    """
    gain = gain.clone()
    member = torch.full((len(gain),), -1, device=gain.device)
    left = torch.arange(len(gain), device=gain.device)
    room = [size] * gain.shape[1]
    while len(left):
        top = gain[left].topk(min(2, gain.shape[1]), dim=1)
        choice, regret = top.indices[:, 0], top.values[:, 0] - top.values[:, -1]
        for group in sorted(set(choice.tolist())):
            asking = left[choice == group]
            ranked = regret[choice == group].argsort(descending=True, stable=True)
            taken = asking[ranked[: room[group]]]
            member[taken] = group
            room[group] -= len(taken)
            if not room[group]:
                gain[:, group] = -torch.inf
        left = left[member[left] < 0]
    return member


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
