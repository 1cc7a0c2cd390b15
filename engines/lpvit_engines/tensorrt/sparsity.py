"""Proof that sparse layers run sparse kernels, and that they win.

TensorRT only adds sparse kernels to those it times, and takes a dense one where that is faster: 2:4
zeros in the weights prove nothing. What counts is its log, its inspector, and our own timing.
"""

import re
from collections.abc import Sequence

import msgspec

from lpvit_engines.tensorrt.inspector import EngineLayer, owners
from lpvit_engines.tensorrt.log import Line

_FOUND = re.compile(r"\(Sparsity\) Found (\d+) layer")
_CHOSE = re.compile(r"\(Sparsity\) Chose (\d+) layer")


class SparsityCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TensorRT's own count; None where its log did not say."""

    eligible: int | None
    chosen: int | None


class LayerProof(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One sparse layer against its dense twin, both timed on the device."""

    layer: str
    pattern: str
    dense_ms: float
    sparse_ms: float
    kernel: str  # that runs in the finished engine
    kept: bool
    reason: str | None = None  # why it was reverted to dense
    memory_skips: int = 0  # kernels that its two trials passed over for want of memory


def count(lines: Sequence[Line]) -> SparsityCount:
    """The last pair in the log: TensorRT repeats the lines in each pass of its selection."""
    found = [int(m[1]) for line in lines if (m := _FOUND.search(line.text))]
    chose = [int(m[1]) for line in lines if (m := _CHOSE.search(line.text))]
    return SparsityCount(eligible=found[-1] if found else None, chosen=chose[-1] if chose else None)


def verdict(
    *,
    layer: str,
    pattern: str,
    dense_ms: float,
    sparse_ms: float,
    spread_ms: float,
    sparse_layers: Sequence[EngineLayer],
    memory_skips: int = 0,
) -> LayerProof:
    """Keep a layer only if a sparse kernel ran in its trial and won by more than the scatter.

    sparse_layers is the trial engine; for blocks the plugin is the sparse kernel.
    """
    ran = [x for x in sparse_layers if x.sparse or is_plugin(x)]
    kernel = (ran or list(sparse_layers))[0].kernel if sparse_layers else "unnamed"
    reason = None
    if not ran:
        reason = "TensorRT chose a dense kernel"
    elif dense_ms - sparse_ms <= spread_ms:
        reason = f"{sparse_ms:.4f} ms sparse against {dense_ms:.4f} ms dense, +- {spread_ms:.4f}"
    return LayerProof(
        layer=layer,
        pattern=pattern,
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
        kernel=kernel,
        kept=reason is None,
        reason=reason,
        memory_skips=memory_skips,
    )


def is_plugin(layer: EngineLayer) -> bool:
    """Whether TensorRT runs our plugin here."""
    return "PluginV3" in layer.type or any(
        name in layer.kernel for name in ("BlockSparseLinear", "PluginV3")
    )


def confirm(
    proofs: Sequence[LayerProof], built: Sequence[EngineLayer], counted: SparsityCount
) -> tuple[LayerProof, ...]:
    """The proofs as the finished engine bears them out, with the kernels that run there.

    A layer won alone, but TensorRT may decide otherwise in the whole network; then it is not kept
    and the reason says so. One whose name TensorRT lost was built sparse and is kept, with the
    reason that nobody saw it; a 2:4 one is not where TensorRT says that it chose none. One that was
    reverted and runs a sparse kernel all the same has that in its reason.
    """
    return tuple(_confirmed(proof, tuple(built), counted) for proof in proofs)


def _confirmed(
    proof: LayerProof, built: tuple[EngineLayer, ...], counted: SparsityCount
) -> LayerProof:
    mine = node_layers(built, proof.layer)
    sparse = [x for x in mine if x.sparse or is_plugin(x)]
    kernel = (sparse or mine)[0].kernel if mine else "fused: TensorRT lost the layer's name"
    kept, reason = proof.kept, proof.reason
    none_chosen = proof.pattern == "2:4" and counted.chosen == 0
    if proof.kept and not mine and not none_chosen:
        reason = "built sparse; not seen in the engine, where TensorRT lost its name"
    elif proof.kept and not sparse:
        kept = False
        reason = "TensorRT chose a dense kernel for it in the whole network"
        if counted.chosen == 0:
            reason += f" (eligible {counted.eligible}, chosen 0)"
    elif not proof.kept and sparse:
        reason = f"{reason}; built dense, and a sparse kernel runs all the same"
    return msgspec.structs.replace(proof, kernel=kernel, kept=kept, reason=reason)


def runs_dense(proofs: Sequence[LayerProof], built: Sequence[EngineLayer]) -> frozenset[str]:
    """Layers of which a kernel is seen in the engine, and it is no sparse one."""
    seen = {p.layer: node_layers(tuple(built), p.layer) for p in proofs}
    return frozenset(
        name
        for name, mine in seen.items()
        if mine and not any(x.sparse or is_plugin(x) for x in mine)
    )


def node_layers(built: tuple[EngineLayer, ...], layer: str) -> list[EngineLayer]:
    """Built layers of a model layer: its sparse node bears its name, its product name/MatMul."""
    names = (layer, f"{layer}/MatMul", f"{layer}/Gemm")
    return [found for name in names for found in owners(built, name)]


def table(proofs: Sequence[LayerProof]) -> list[tuple[str, ...]]:
    """Rows to print: layer, pattern, dense ms, sparse ms, kernel, kept or reverted with why."""
    return [
        (
            p.layer,
            p.pattern,
            f"{p.dense_ms:.4f}",
            f"{p.sparse_ms:.4f}",
            p.kernel,
            ": ".join(text for text in ("kept" if p.kept else "dense", p.reason) if text),
        )
        for p in proofs
    ]
