"""Other libraries' pruning of the same model, with the same calibration images, on the CPU.

NVIDIA Model Optimizer (Apache-2.0) in 2:4: `sparse_magnitude`, and `sparsegpt`, which takes only
the mask from SparseGPT and leaves the weights that stay as they are (0.47: create_sgpt_mask works
on a clone). Torch-Pruning (MIT; DepGraph, arXiv 2301.12900) removes head channels and hidden
neurons by group Taylor importance, the same share in each layer; width and depth stay, and so a
Swin's patch merging, for which its other layers give more.
"""

import copy
from typing import Any

from torch import nn
from torch.nn import functional

from benchmarks.pruning_subject import Subject, batches
from lpvit_edge.deps import require

_BATCH = 32
_NARROWED = ("attn.qkv", "mlp.fc1")  # outputs that Torch-Pruning takes out, and what they feed:
_FED = ("attn.proj", "mlp.fc2")


def modelopt_magnitude(subject: Subject, _: float) -> nn.Module:
    """The two largest of four weights stay."""
    return _modelopt(subject, "sparse_magnitude", {})


def modelopt_sparsegpt(subject: Subject, _: float) -> nn.Module:
    """SparseGPT's choice of two of four."""

    def forward_loop(model: nn.Module) -> None:
        for images in batches(subject.images, _BATCH):
            model(images)

    return _modelopt(subject, "sparsegpt", {"forward_loop": forward_loop, "device": "cpu"})


def _modelopt(subject: Subject, mode: str, config: dict[str, Any]) -> nn.Module:
    sparsity = require("modelopt.torch.sparsity")
    pruned = {layer.name for layer in subject.walk.layers}
    others = {
        name: None
        for name, module in subject.module.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in pruned
    }
    rules = {"nn.Linear": {"*": {}, **others}, "nn.Conv2d": {"*": None}}
    model = copy.deepcopy(subject.module)
    found: nn.Module = sparsity.export(sparsity.sparsify(model, [(mode, rules)], config=config))
    return found


def torch_pruning(subject: Subject, sparsity: float) -> nn.Module:
    """A narrower copy: attentions and MLPs lose the same share of their channels.

    `sparsity` is of the MACs of all prunable layers; channels are whole, so that up to one more of
    each head goes.
    """
    tp = require("torch_pruning")
    model = copy.deepcopy(subject.module)
    attentions: list[Any] = [module for module in model.modules() if hasattr(module, "qkv")]
    for attention in attentions:
        attention.fused_attn = False  # keeps the trained scale 1 / sqrt(head_dim) when pruned
    _accumulate_gradients(model, subject)
    narrowed = {m for name, m in model.named_modules() if name.endswith(_NARROWED)}
    thinner = [layer for layer in subject.walk.layers if layer.name.endswith(_NARROWED + _FED)]
    pruner = tp.pruner.BasePruner(
        model,
        subject.images[:1],
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=subject.raised(sparsity, thinner),
        ignored_layers=[*_kept(model, narrowed)],
        num_heads={attention.qkv: attention.num_heads for attention in attentions},
    )
    pruner.step()
    for attention in attentions:
        attention.attn_dim = attention.qkv.out_features // 3
        attention.head_dim = attention.attn_dim // attention.num_heads
    model.zero_grad()
    return model


def _kept(model: nn.Module, narrowed: set[nn.Module]) -> list[Any]:
    """Everything whose outputs stay: modules of weights, and parameters outside of them."""
    kinds = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.BatchNorm2d)
    modules = [m for m in model.modules() if isinstance(m, kinds) and m not in narrowed]
    inside = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    return [*modules, *(p for p in model.parameters() if id(p) not in inside)]


def _accumulate_gradients(model: nn.Module, subject: Subject) -> None:
    model.zero_grad()
    parts = (batches(tensor, _BATCH) for tensor in (subject.images, subject.targets))
    for images, targets in zip(*parts, strict=True):
        loss = functional.cross_entropy(model(images), targets, reduction="sum")
        (loss / len(subject.images)).backward()  # type: ignore[no-untyped-call]
