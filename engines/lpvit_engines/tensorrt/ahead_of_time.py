"""lpvit::BlockSparseLinear in the form that needs no Python at run time, from TensorRT 10.9 on.

TensorRT keeps the kernel's PTX in the plan and launches it itself: trtexec and C++ load such a plan
as any other. It passes the addresses of the inputs, int32 numbers, and the addresses of the
outputs, in this order (tensorrt.plugin.aot_impl). That is the order of our kernels' parameters too,
but for a residual and two scratch buffers which float16 layers without a residual never read: their
declarations are taken out of the PTX. Its driver compiles the PTX when the plan is loaded.

One process has one of the two forms, since both answer to the same node.
"""

import math
import re
from types import GenericAlias
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.deps import require
from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.cuda.kernel import beyond_a_launch
from lpvit_engines.cuda.manifest import KernelManifest, Variant, read_image, shipped_manifest
from lpvit_engines.tensorrt.forms import register_once
from lpvit_engines.tensorrt.library import version_of
from lpvit_engines.tensorrt.plugin_fields import NAME, NAMESPACE

OLDEST = (10, 9)
_ABSENT = ("residual", "scratch", "profile_scratch")
_SHARED_WITHOUT_OPTIN = 48 * 1024  # whether TensorRT asks for more is written nowhere


def register(trt: Any) -> None:
    """Make this form known, before parsing; again is harmless.

    Raises EnvironmentUnfitError before TensorRT 10.9, EngineError where the other form is there.
    """
    if version_of(trt) < OLDEST:
        raise EnvironmentUnfitError(
            f"TensorRT {trt.__version__} keeps no kernels of Python plugins in its plans; version "
            "10.9 (JetPack 7) does. Build without python_free"
        )

    def with_functions(_: Any) -> None:
        plugins = require("tensorrt.plugin")
        plugins.register(f"{NAMESPACE}::{NAME}")(_described(plugins))
        plugins.aot_impl(f"{NAMESPACE}::{NAME}")(_compiled(plugins))

    register_once(trt, "ptx", with_functions)


def _described(plugins: Any) -> Any:
    """What tensorrt.plugin.register wants: the output by the inputs, with types as annotations."""

    def described(  # type: ignore[no-untyped-def]  # TensorRT reads annotations; they stand below
        x,
        panels,
        rows,
        columns,
        bias,
        block_rows,
        block_cols,
        in_features,
        out_features,
        activation,
    ):
        y = x.like()
        y.shape_expr[len(y.shape_expr) - 1] = int(out_features[0])
        return y

    tensors = ("x", "panels", "rows", "columns", "bias")
    # Arrays of one: the bindings make an int of an attribute in a way that numpy 2.4 refuses.
    integers = ("block_rows", "block_cols", "in_features", "out_features")
    described.__annotations__.update(
        {
            **dict.fromkeys(tensors, plugins.TensorDesc),
            **dict.fromkeys(integers, NDArray[np.int32]),
            "activation": str,
            "return": plugins.TensorDesc,
        }
    )
    return described


def _compiled(plugins: Any) -> Any:
    """What tensorrt.plugin.aot_impl wants: kernel, PTX, launch and numbers by the inputs."""

    def compiled(  # type: ignore[no-untyped-def]  # TensorRT reads annotations; it wants the last
        x,
        panels,
        rows,
        columns,
        bias,
        block_rows,
        block_cols,
        in_features,
        out_features,
        activation,
        outputs,
        tactic,
    ):
        manifest = shipped_manifest()
        sizes = (block_rows, block_cols, in_features, out_features)
        rows_each, cols_each, inputs, outs = (int(array[0]) for array in sizes)
        variant = manifest.find(
            block_rows=rows_each, block_cols=cols_each, dtype="float16", epilogue=activation
        )
        image = variant.images["ptx"]
        tokens = plugins.SymInt32(1)
        before_last = [x.shape_expr[index] for index in range(len(x.shape_expr) - 1)]
        for size in before_last:
            tokens = tokens * size
        _refuse_uncounted(before_last, widest=max(inputs, outs), tile_rows=variant.tile_rows)
        launch = plugins.KernelLaunchParams()
        launch.grid_x = outs // rows_each
        launch.grid_y = plugins.cdiv(tokens, variant.tile_rows)
        launch.block_x = image.warps * 32
        launch.shared_mem = image.shared_bytes
        numbers = plugins.SymIntExprs(3)
        for index, number in enumerate((tokens, inputs, outs)):
            numbers[index] = plugins.SymInt32(number)
        return manifest.entry, trimmed_ptx(manifest, variant), launch, numbers

    answer = (str, str, plugins.KernelLaunchParams, plugins.SymIntExprs)
    compiled.__annotations__["return"] = GenericAlias(tuple, answer)
    return compiled


def _refuse_uncounted(sizes: list[Any], *, widest: int, tile_rows: int) -> None:
    """Raise EngineError for more tokens than one launch computes, where their number is known."""
    if any(size.is_fake or not size.is_constant for size in sizes):
        return
    tokens = math.prod(size.constant_value() for size in sizes)
    uncounted = beyond_a_launch(tokens, widest=widest, tile_rows=tile_rows)
    if uncounted is not None:
        raise EngineError(uncounted)


def trimmed_ptx(manifest: KernelManifest, variant: Variant) -> str:
    """The shipped PTX of a kernel with the parameters that TensorRT passes, and no others."""
    if variant.images["ptx"].shared_bytes > _SHARED_WITHOUT_OPTIN:
        raise EngineError(f"{variant.name} needs more shared memory than a plan can ask for")
    text = read_image(variant, target="ptx").decode()
    head, opened, body = text.partition(")\n")
    for index, parameter in enumerate(manifest.parameters):
        if parameter.name not in _ABSENT:
            continue
        name = f"{manifest.entry}_param_{index}"
        if re.search(rf"\b{name}\b", body):
            raise EngineError(f"{variant.name} reads {parameter.name}, which a plan cannot pass")
        head, found = re.subn(rf",?\s*\.param [^,()]*\b{name}\b", "", head)
        if found != 1:
            raise EngineError(f"the PTX of {variant.name} declares no {name}; reinstall lpvit-edge")
    return head + "\n" + opened + body
