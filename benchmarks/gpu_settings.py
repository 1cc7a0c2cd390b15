"""Settings of the block-sparse kernel that gpu_tune.py tries, compiled where they run."""

from typing import Any

import msgspec
import torch

from benchmarks.gpu_records import Setting
from lpvit_engines.cuda.packing import PANEL_COLS
from lpvit_engines.cuda.torch_op import WeightTensors

_ADD_ROWS = 32  # a CTA of add_splits


def launch(
    setting: Setting,
    x: torch.Tensor,
    weight: WeightTensors,
    *,
    multiprocessors: int,
    y: torch.Tensor | None = None,
    epilogue: str = "none",
    residual: torch.Tensor | None = None,
    interpreted: bool = False,
) -> torch.Tensor:
    """epilogue(x @ W.T + bias) by Triton's own compiler and launcher; x is (tokens, in_features),
    y and residual (tokens, out_features). interpreted is for Triton's interpreter on a CPU."""
    from cuda_src import candidates
    from cuda_src.block_sparse_linear import block_sparse_linear

    tokens, block_rows = len(x), len(weight.rows)
    out_features, width = len(weight.bias), weight.values.shape[1]
    y = x.new_empty(tokens, out_features) if y is None else y
    tiles = -(-tokens // setting.tile_rows)
    shape: dict[str, Any] = {"BM": setting.tile_rows, "BN": width}
    panels = {"BK": weight.block_cols, "KT": PANEL_COLS, "UPCAST": interpreted and is_bf16(x)}
    compiled = {"num_warps": setting.warps, "num_stages": setting.stages}
    sparse = (weight.values, weight.rows, weight.columns)
    ends = (weight.bias, weight.bias if residual is None else residual)
    sizes = (tokens, x.shape[1], out_features)
    if setting.schedule == "grid":
        kernel: Any = block_sparse_linear  # type checkers see no launch syntax
        kernel[(block_rows, tiles)](
            x, *sparse, *ends, *sizes, y, EPILOGUE=epilogue, **shape, **panels, **compiled
        )
    elif setting.schedule == "persistent":
        kernel = candidates.persistent
        programs = min(multiprocessors * setting.parts, block_rows * tiles)
        kernel[(programs,)](
            x, *sparse, *ends, *sizes, y, block_rows, EPILOGUE=epilogue, **shape, **panels,
            **compiled,
        )  # fmt: skip
    else:
        kernel = candidates.split_sum
        partial = x.new_empty(setting.parts, tokens, out_features, dtype=torch.float32)
        kernel[(block_rows, tiles, setting.parts)](
            x, *sparse, *sizes, partial, SPLITS=setting.parts, **shape, **panels, **compiled
        )
        kernel = candidates.add_splits
        kernel[(block_rows, -(-tokens // _ADD_ROWS))](
            partial, *ends, tokens, out_features, y, BM=_ADD_ROWS, BN=width,
            SPLITS=setting.parts, EPILOGUE=epilogue,
        )  # fmt: skip
    return y


def is_bf16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def grid_settings() -> list[Setting]:
    """Tiles, warps and stages. Stages count loads behind an indirect one: 3 leave one buffer, 5 and
    7 give two and three."""
    return [
        Setting(tile_rows=rows, warps=warps, stages=stages)
        for rows in (32, 64, 128)
        for warps in (4, 8)
        for stages in (3, 5, 7)
    ]


def schedules_of(best: Setting) -> list[Setting]:
    """The other schedules of a compiled shape."""
    change = msgspec.structs.replace
    return [
        *(change(best, schedule="persistent", parts=parts) for parts in (1, 2, 4)),
        *(change(best, schedule="split-K", parts=parts) for parts in (2, 4, 8)),
    ]
