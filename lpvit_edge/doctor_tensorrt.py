"""Whether TensorRT builds here, and answers rightly: engines of one layer, in seconds.

Only where TensorRT is installed. Nothing else of the doctor imports what vendors made.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec

from lpvit_edge.doctor import WEAKLY_TYPED, Finding, Status, layer_name
from lpvit_edge.errors import LpvitEdgeError
from lpvit_profilers.device import DeviceIdentity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lpvit_engines.tensorrt.build import Built
    from lpvit_engines.tensorrt.device import OpenDevice

# NVIDIA's release notes: JetPack -> (TensorRT, CUDA) that it brings.
JETPACKS = {
    "6.1": ("10.3", "12.6"),
    "6.2": ("10.3", "12.6"),
    "7.0": ("10.13", "13.0"),
    "7.1": ("10.13", "13.0"),
    "7.2": ("10.16", "13.2"),
}
_LEAST_FREE_MB = 1500
_TOKENS, _WIDTH = 64, 512  # 2:4 kernels need more than 256 inputs and outputs to win
LAYERS = ("dense", "2:4", "64x16")
_AGREES = 0.01  # of the largest output; float16 explains a fifth of that, see rounding.py


def examine_tensorrt(device: DeviceIdentity) -> tuple[Finding, ...]:
    """Versions, free memory, and one small engine of each form, each with its remedy."""
    from lpvit_engines.tensorrt.device import opened
    from lpvit_engines.tensorrt.library import load_tensorrt

    try:
        version = str(load_tensorrt().__version__)
        with opened() as gpu, gpu.calls.current(gpu.context):
            return (
                _versions(device, version, gpu.calls.driver_version(), through=gpu.calls.through),
                _free_memory(gpu.calls.free_bytes() // 2**20),
                *(_built(pattern, gpu, version) for pattern in LAYERS),
            )
    except LpvitEdgeError as error:
        return (_finding("engine", "warning", *_split(error)),)


def _finding(name: str, status: Status, found: str, remedy: str | None = None) -> Finding:
    return Finding(area="tensorrt", name=name, status=status, found=found, remedy=remedy)


def _split(error: LpvitEdgeError) -> tuple[str, str]:
    """What happened, and what to do."""
    what, _, remedy = str(error).partition(" To do: ")
    return what, remedy or "repair this first: no TensorRT engine can be built or run here"


def _versions(device: DeviceIdentity, version: str, driver: int, *, through: str) -> Finding:
    """TensorRT and CUDA against what the JetPack brings."""
    cuda = f"{driver // 1000}.{driver % 1000 // 10}"
    found = f"TensorRT {version}, driver for CUDA {cuda} through {through}"
    release = ".".join((device.jetpack or "").split(".")[:2])
    if not release:
        return _finding("versions", "ok", found)
    if release not in JETPACKS:
        known = ", ".join(JETPACKS)
        remedy = f"JetPack {release} is none of {known}, for which this was written; tell us"
        return _finding("versions", "warning", found, remedy)
    expected, expected_cuda = JETPACKS[release]
    if (".".join(version.split(".")[:2]), cuda) != (expected, expected_cuda):
        remedy = (
            f"JetPack {release} brings TensorRT {expected} and CUDA {expected_cuda}; use them: "
            "apt install python3-libnvinfer, and a venv with --system-site-packages"
        )
        return _finding("versions", "warning", found, remedy)
    return _finding("versions", "ok", f"{found}, as JetPack {release} brings them")


def _free_memory(free_mb: int) -> Finding:
    if free_mb >= _LEAST_FREE_MB:
        return _finding("free memory", "ok", f"{free_mb} MB")
    remedy = (
        "TensorRT passes over kernels that do not fit: stop the desktop (sudo systemctl isolate "
        "multi-user.target) and other programs before `lpvit build`"
    )
    return _finding("free memory", "warning", f"{free_mb} MB", remedy)


class _Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer behind a normalization, as a portable model; what it must answer."""

    portable: Any
    x: Any  # (1, tokens, width) float32
    expected: Any  # likewise


def _built(pattern: str, gpu: "OpenDevice", version: str) -> Finding:
    """Build one strongly typed layer of a pattern, and run it."""
    from lpvit_edge.check import relative_error

    try:
        layer = _one_layer(pattern)
        built = _build(layer.portable, gpu, two_four=pattern == "2:4")
        error = relative_error(_answer(built, gpu, layer.x), layer.expected)
    except LpvitEdgeError as problem:
        what, remedy = _split(problem)
        return _finding(layer_name(pattern), "warning", what, remedy)
    kernels = ", ".join(dict.fromkeys(layer.kernel for layer in built.layers))
    if not error <= _AGREES:
        remedy = "build no such layers here, and tell us: lpvit doctor --json"
        found = f"answers differ by {error:.2%} of the largest: {kernels}"
        return _finding(layer_name(pattern), "warning", found, remedy)
    if not built.strongly_typed:
        remedy = f"TensorRT {version} refused it strongly typed and took it weakly typed; tell us"
        return _finding(layer_name(pattern), "warning", WEAKLY_TYPED, remedy)
    if pattern == "2:4" and not any(layer.sparse for layer in built.layers):
        remedy = "allocate blocks instead (--patterns 64x16,32x32): 2:4 brings nothing here"
        return _finding(
            layer_name(pattern), "warning", f"built with a dense kernel: {kernels}", remedy
        )
    return _finding(layer_name(pattern), "ok", f"built, right within {error:.2%}: {kernels}")


def _build(portable: Any, gpu: "OpenDevice", *, two_four: bool) -> "Built":
    from lpvit_engines.tensorrt.build import build
    from lpvit_engines.tensorrt.forms import form_for
    from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy

    copy = tensorrt_copy(portable)
    with TemporaryDirectory() as folder:
        return build(
            copy.SerializeToString(),
            sparse_weights=two_four,
            free_bytes=gpu.calls.free_bytes(),
            device="doctor",
            weak=lambda: tensorrt_copy(portable, half=False).SerializeToString(),
            cache=Path(folder),
            form=form_for(copy, python_free=False),
        )


def _answer(built: "Built", gpu: "OpenDevice", x: "NDArray[np.float32]") -> "NDArray[np.float32]":
    from lpvit_engines.tensorrt.answers import answering

    with answering(built.plan, gpu, python_free=built.python_free) as answer:
        return answer(x)


def _one_layer(pattern: str) -> _Layer:
    import numpy as np

    from lpvit_edge.onnx_nodes import repeated_layer_model
    from lpvit_engines.block_sparse import BlockSparseMatrix

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((_WIDTH, _WIDTH)).astype(np.float32)
    weight /= np.float32(_WIDTH**0.5)
    given: Any = weight
    if pattern == "2:4":
        weight.reshape(_WIDTH, -1, 4)[:, :, 2:] = 0
    elif pattern != "dense":
        rows, cols = (int(part) for part in pattern.split("x"))
        weight.reshape(_WIDTH // rows, rows, -1)[::2, :, : _WIDTH // 2] = 0
        given = BlockSparseMatrix.from_dense(weight, block_rows=rows, block_cols=cols)
    portable = repeated_layer_model(
        tokens=_TOKENS, in_features=_WIDTH, out_features=_WIDTH, activation="none", copies=[given]
    )
    _show_whole_layer(portable)
    x = rng.standard_normal((1, _TOKENS, _WIDTH)).astype(np.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    bias = np.linspace(-1, 1, _WIDTH, dtype=np.float32)
    return _Layer(portable=portable, x=x, expected=normal @ weight.T + bias)


def _show_whole_layer(portable: Any) -> None:
    """Give out the layer's result, of which the models for timing show one number."""
    graph = portable.graph
    result = next(node.input[0] for node in graph.node if node.op_type == "Slice")
    kept = [node for node in graph.node if node.op_type not in ("Slice", "Concat")]
    del graph.node[:]
    graph.node.extend(kept)
    graph.output[0].name = result
    dimensions = graph.output[0].type.tensor_type.shape.dim
    for dimension, size in zip(dimensions, (1, _TOKENS, _WIDTH), strict=True):
        dimension.dim_value = size
