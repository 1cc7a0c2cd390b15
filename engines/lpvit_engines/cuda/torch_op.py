"""The kernels as a torch operator, so that a torch model can run sparse on a GPU.

    weight = to_tensors(packed, bias, device="cuda")
    y = block_sparse_linear(x, weight, activation="gelu")

torch.ops.lpvit.block_sparse_linear is registered by the first call. It runs the shipped binaries on
CUDA tensors, has a slow and independent CPU implementation, and traces under torch.compile and
torch.export. Run a layer once before capturing it in a CUDA graph: the first call loads the kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError
from lpvit_engines.cuda.context import ensure_context
from lpvit_engines.cuda.half import to_bits
from lpvit_engines.cuda.kernel import Kernel, open_kernel
from lpvit_engines.cuda.packing import PackedWeight
from lpvit_engines.cuda.torch_checks import check_tensors, check_weight_once, epilogue_of

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = (
    "(Tensor x, Tensor values, Tensor rows, Tensor columns, Tensor bias, Tensor? residual, "
    "int in_features, int block_cols, str activation) -> Tensor"
)


@dataclass(frozen=True, kw_only=True)
class WeightTensors:
    """A packed weight and its bias as tensors on one device."""

    values: "Tensor"
    rows: "Tensor"
    columns: "Tensor"
    bias: "Tensor"
    in_features: int
    block_cols: int


def to_tensors(
    packed: PackedWeight, bias: NDArray[Any] | None, *, device: str | int = "cuda"
) -> WeightTensors:
    """Move a packed weight to a device; bias (out_features,), None for zeros.

    Raises EngineError for a bias of another length, ModelError for one that is not finite.
    """
    torch = require("torch")
    numbers = np.zeros(packed.out_features) if bias is None else np.asarray(bias)
    if numbers.shape != (packed.out_features,):
        raise EngineError(
            f"the bias has the shape {numbers.shape}, the weight has {packed.out_features} rows: "
            "pass the bias of the same layer"
        )
    dtype = getattr(torch, packed.dtype)

    def half(bits: NDArray[np.uint16]) -> "Tensor":
        moved: Tensor = torch.from_numpy(bits).to(device).view(dtype)
        return moved

    return WeightTensors(
        values=half(packed.values),
        rows=torch.from_numpy(packed.rows).to(device),
        columns=torch.from_numpy(packed.columns).to(device),
        bias=half(to_bits(numbers, dtype=packed.dtype)),
        in_features=packed.in_features,
        block_cols=packed.block_cols,
    )


def block_sparse_linear(
    x: "Tensor",
    weight: WeightTensors,
    *,
    activation: str = "none",
    residual: "Tensor | None" = None,
) -> "Tensor":
    """activation(x @ W.T + bias), or x @ W.T + bias + residual; x is (..., in_features).

    activation is "none" or "gelu" (the exact one, torch's default). Raises EngineError for tensors
    that do not fit the weight.
    """
    y: Tensor = register()(
        x, weight.values, weight.rows, weight.columns, weight.bias, residual,
        weight.in_features, weight.block_cols, activation,
    )  # fmt: skip
    return y


@lru_cache(maxsize=1)
def register() -> Any:
    """Register lpvit::block_sparse_linear and return it."""
    # Not custom_op, which wraps each call in another 3 us of Python under inference_mode.
    return registered("lpvit::block_sparse_linear", on_cuda=_on_cuda, on_cpu=_on_cpu)


def registered(name: str, *, on_cuda: Any, on_cpu: Any) -> Any:
    """An operator of SCHEMA under a name, for the process."""
    torch = require("torch")
    torch.library.define(name, SCHEMA)
    torch.library.impl(name, "cuda", on_cuda)
    torch.library.impl(name, "cpu", on_cpu)
    torch.library.register_fake(name, _shape_only)
    torch.library.register_autograd(name, _no_gradient)
    namespace, _, short = name.partition("::")
    return getattr(getattr(torch.ops, namespace), short).default


def _no_gradient(*_: Any) -> Any:
    raise EngineError(
        "the block-sparse kernels compute no gradients: train the dense weight with its zeros, and "
        "evaluate under torch.inference_mode()"
    )


def _shape_only(
    x: "Tensor", values: Any, rows: Any, columns: Any, bias: "Tensor", *_: Any
) -> "Tensor":
    return x.new_empty((*x.shape[:-1], bias.shape[0]))


def _on_cuda(
    x: "Tensor",
    values: "Tensor",
    rows: "Tensor",
    columns: "Tensor",
    bias: "Tensor",
    residual: "Tensor | None",
    in_features: int,
    block_cols: int,
    activation: str,
) -> "Tensor":
    torch = require("torch")
    with torch.cuda.device(x.device):
        ensure_context(x.device.index)
        return checked_launch(
            x, values, rows, columns, bias, residual, in_features, block_cols, activation,
            find=loaded_kernel, device=x.device.index,
            stream=torch.cuda.current_stream(x.device).cuda_stream,
        )  # fmt: skip


def checked_launch(
    x: "Tensor",
    values: "Tensor",
    rows: "Tensor",
    columns: "Tensor",
    bias: "Tensor",
    residual: "Tensor | None",
    in_features: int,
    block_cols: int,
    activation: str,
    *,
    find: Callable[[int, int, int, Any, str], Kernel],
    device: int,
    stream: int,
) -> "Tensor":
    """All that a call does beside torch's own bookkeeping; the device's context is current."""
    check_weight_once(values, rows, columns, bias, block_cols=block_cols)
    check_tensors(x, values, bias, residual, in_features=in_features)
    epilogue = epilogue_of(activation, adds_residual=residual is not None)
    kernel = find(device, values.shape[1], block_cols, x.dtype, epilogue)
    return launch_on_tensors(kernel, x, values, rows, columns, bias, residual, stream=stream)


@cache
def loaded_kernel(
    device: int, block_rows: int, block_cols: int, dtype: Any, epilogue: str
) -> Kernel:
    """The kernel for a device, whose context is current; stays loaded as long as the process."""
    return open_kernel(
        block_rows=block_rows,
        block_cols=block_cols,
        dtype=str(dtype).removeprefix("torch."),
        epilogue=epilogue,
    )


def launch_on_tensors(
    kernel: Kernel,
    x: "Tensor",
    values: "Tensor",
    rows: "Tensor",
    columns: "Tensor",
    bias: "Tensor",
    residual: "Tensor | None",
    *,
    stream: int,
) -> "Tensor":
    """Start the kernel on a stream; returns y, (..., out_features) of x's type."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], bias.shape[0]))
    added = None if residual is None else residual.contiguous()
    kernel.launch(
        x=x.data_ptr(),
        values=values.data_ptr(),
        rows=rows.data_ptr(),
        columns=columns.data_ptr(),
        bias=bias.data_ptr(),
        residual=0 if added is None else added.data_ptr(),
        tokens=x.numel() // x.shape[-1],
        ldx=x.shape[-1],
        ldy=bias.shape[0],
        y=y.data_ptr(),
        block_row_count=rows.shape[0],
        stream=stream,
    )
    return y


def _on_cpu(
    x: "Tensor",
    values: "Tensor",
    rows: "Tensor",
    columns: "Tensor",
    bias: "Tensor",
    residual: "Tensor | None",
    in_features: int,
    block_cols: int,
    activation: str,
) -> "Tensor":
    """Densely, in float32: for models without a GPU and as the oracle of the GPU's tests."""
    torch = require("torch")
    check_weight_once(values, rows, columns, bias, block_cols=block_cols)
    check_tensors(x, values, bias, residual, in_features=in_features)
    epilogue = epilogue_of(activation, adds_residual=residual is not None)
    weight = _dense(values, rows, columns, in_features=in_features, block_cols=block_cols)
    y = torch.nn.functional.linear(x.float(), weight, bias.float())
    if epilogue == "gelu":
        y = torch.nn.functional.gelu(y)
    if residual is not None:
        y = y + residual.float()
    out: Tensor = y.to(x.dtype)
    return out


def _dense(
    values: "Tensor",
    rows: "Tensor",
    columns: "Tensor",
    *,
    in_features: int,
    block_cols: int,
) -> "Tensor":
    """The weight (out_features, in_features) float32 behind its panels."""
    torch = require("torch")
    _, block_rows, panel_cols = values.shape
    segments = panel_cols // block_cols
    weight = torch.zeros((len(rows), block_rows, in_features))
    for block_row, first, end, _ in rows.tolist():
        places = columns[first * segments : end * segments, None] + torch.arange(block_cols)
        panels = values[first:end].float().transpose(0, 1).reshape(block_rows, -1)
        weight[block_row].index_add_(1, places.reshape(-1), panels)
    dense: Tensor = weight.reshape(-1, in_features)
    return dense
