"""What the torch operator refuses: tensors that do not fit the weight, and each other."""

from typing import TYPE_CHECKING

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError
from lpvit_engines.cuda.packing import PANEL_COLS

if TYPE_CHECKING:
    from torch import Tensor

_CHECKED = "_lpvit_checked"  # an attribute of values: the tensors that fit it


def check_weight_once(
    values: "Tensor", rows: "Tensor", columns: "Tensor", bias: "Tensor", *, block_cols: int
) -> None:
    """check_weight at the first call with these tensors: it costs as much as a launch. Their shapes
    must not be changed in place afterwards."""
    known = getattr(values, _CHECKED, None)
    if (
        known is not None
        and known[0] is rows
        and known[1] is columns
        and known[2] is bias
        and known[3] == block_cols
    ):
        return
    check_weight(values, rows, columns, bias, block_cols=block_cols)
    setattr(values, _CHECKED, (rows, columns, bias, block_cols))


def check_weight(
    values: "Tensor", rows: "Tensor", columns: "Tensor", bias: "Tensor", *, block_cols: int
) -> None:
    """Refuse weight tensors of one layer that contradict each other in shape, type or device.

    What rows and columns hold is not read, which would wait for the GPU at every call:
    packing.pack writes them, and only what it wrote may be passed.
    """
    torch = require("torch")
    whole = values.ndim == 3 and block_cols > 0 and values.shape[2] == PANEL_COLS
    if (
        not whole
        or rows.shape != (len(rows), 4)
        or columns.shape != (len(values) * (PANEL_COLS // block_cols),)
        or bias.shape != (len(rows) * values.shape[1],)
        or (rows.dtype, columns.dtype, bias.dtype) != (torch.int32, torch.int32, values.dtype)
        or {rows.device, columns.device, bias.device} != {values.device}
        or not all(part.is_contiguous() for part in (values, rows, columns, bias))
    ):
        found = ", ".join(
            f"{name} {part.dtype} {tuple(part.shape)} on {part.device}"
            for name, part in zip(
                ("values", "rows", "columns", "bias"), (values, rows, columns, bias), strict=True
            )
        )
        raise EngineError(
            f"the tensors of the weight contradict each other: {found}, with blocks of "
            f"{block_cols} columns: pass what to_tensors returned, whole"
        )


def check_tensors(
    x: "Tensor",
    values: "Tensor",
    bias: "Tensor",
    residual: "Tensor | None",
    *,
    in_features: int,
) -> None:
    """Refuse an input or residual that does not fit the weight, which passed check_weight."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise EngineError(
            f"x has the shape {tuple(x.shape)}, the weight takes {in_features} features: pass the "
            "input of this layer"
        )
    if x.dtype != values.dtype or x.device != values.device:
        raise EngineError(
            f"x is {x.dtype} on {x.device}, the weight {values.dtype} on {values.device}: pack and "
            "move the weight for the model's type and device"
        )
    wanted = (*x.shape[:-1], bias.shape[0])
    if residual is None:
        return
    if residual.shape != wanted or residual.dtype != x.dtype or residual.device != x.device:
        raise EngineError(
            f"residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}; it must "
            f"be {x.dtype} {wanted} on {x.device}"
        )


def epilogue_of(activation: str, *, adds_residual: bool) -> str:
    """The kernel's epilogue; raises EngineError for one that does not exist."""
    if activation not in ("none", "gelu"):
        raise EngineError(f"the activation {activation!r} is unknown: pass 'none' or 'gelu'")
    if adds_residual and activation != "none":
        raise EngineError(f"no kernel adds a residual after {activation}: add it in torch")
    return "residual" if adds_residual else activation
