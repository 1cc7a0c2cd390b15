"""Whether TensorRT runs attention as one kernel: what it saves there is more than sparsity does."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from lpvit_engines.tensorrt.inspector import EngineLayer

# _gemm_mha_v2_myl0_7 and the like, in the layer's name or its tactic's.
_FUSED = re.compile(r"mha_v\d|fmha", re.IGNORECASE)


class AttentionCount(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attentions in the model, and kernels of the engine that compute a whole one."""

    blocks: int
    fused: int


def attentions(portable: Any) -> int:
    """How many softmaxes of a model feed a product."""
    read = {name for n in portable.graph.node if n.op_type == "MatMul" for name in n.input}
    return sum(n.op_type == "Softmax" and n.output[0] in read for n in portable.graph.node)


def count_attention(portable: Any, built: Sequence[EngineLayer]) -> AttentionCount:
    """The model's attentions, and the fused kernels that the inspector shows."""
    fused = sum(bool(_FUSED.search(f"{x.name} {x.kernel} {x.type}")) for x in built)
    return AttentionCount(blocks=attentions(portable), fused=fused)
