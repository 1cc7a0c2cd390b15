"""Every shipped kernel on a real GPU, against float64. Nothing else here runs on hardware.

LPVIT_REQUIRE_HARDWARE=cuda turns the skip into a failure on a machine that is meant to have a GPU.
"""

import os
import threading
from importlib import import_module
from typing import Any

import pytest

REQUIRED = os.environ.get("LPVIT_REQUIRE_HARDWARE") == "cuda"


def needed(module: str, *, reason: str) -> Any:
    """A module; where the hardware is required, its absence is an error and no skip."""
    return import_module(module) if REQUIRED else pytest.importorskip(module, reason=reason)


torch = needed("torch", reason="the GPU is reached through torch")

from benchmarks.gpu_records import Setting  # noqa: E402
from benchmarks.gpu_settings import grid_settings, launch, schedules_of  # noqa: E402
from lpvit_engines.cuda.manifest import Variant, shipped_manifest  # noqa: E402
from lpvit_engines.cuda.torch_op import block_sparse_linear, loaded_kernel, to_tensors  # noqa: E402
from tests.cuda.layers import Case, assert_close, layer  # noqa: E402

pytestmark = [
    pytest.mark.hardware("cuda"),
    pytest.mark.skipif(
        not torch.cuda.is_available() and not REQUIRED,
        reason="no CUDA device",
    ),
]
VARIANTS = shipped_manifest().variants


def assert_computed(case: Case) -> None:
    problem = layer(case)
    dtype = getattr(torch, case.dtype)

    def half(bits: Any) -> Any:
        return torch.from_numpy(bits).cuda().view(dtype)

    bias = half(problem.bias).float().cpu().numpy()
    y = block_sparse_linear(
        half(problem.x),
        to_tensors(problem.packed, bias),
        activation="gelu" if case.epilogue == "gelu" else "none",
        residual=half(problem.residual) if case.epilogue == "residual" else None,
    )
    assert_close(y.cpu().view(torch.uint16).numpy(), case, problem.expected)


@pytest.mark.parametrize("tokens", [1, 64, 197])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_kernel_computes_the_layer(variant: Variant, tokens: int) -> None:
    assert_computed(
        Case(
            block_rows=variant.block_rows,
            block_cols=variant.block_cols,
            dtype=variant.dtype,
            epilogue=variant.epilogue,
            tokens=tokens,
        )
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_nothing_is_written_past_the_last_token(variant: Variant) -> None:
    case = Case(
        block_rows=variant.block_rows,
        block_cols=variant.block_cols,
        dtype=variant.dtype,
        epilogue=variant.epilogue,
    )
    problem = layer(case)
    dtype = getattr(torch, case.dtype)
    x, residual = (
        torch.from_numpy(bits).cuda().view(dtype) for bits in (problem.x, problem.residual)
    )
    weight = to_tensors(problem.packed, None)
    outputs = problem.packed.out_features
    y = torch.full((case.tokens + 64, outputs), float("nan"), device="cuda", dtype=dtype)
    kernel = loaded_kernel(0, case.block_rows, case.block_cols, dtype, case.epilogue)
    kernel.launch(
        x=x.data_ptr(),
        values=weight.values.data_ptr(),
        rows=weight.rows.data_ptr(),
        columns=weight.columns.data_ptr(),
        bias=weight.bias.data_ptr(),
        residual=residual.data_ptr() if case.epilogue == "residual" else 0,
        tokens=case.tokens,
        ldx=x.shape[1],
        ldy=outputs,
        y=y.data_ptr(),
        block_row_count=len(weight.rows),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    torch.cuda.synchronize()
    assert not y[: case.tokens].isnan().any()
    assert y[case.tokens :].isnan().all()


def test_a_layer_of_deit_b_at_batch_8() -> None:
    assert_computed(
        Case(block_rows=64, block_cols=16, tokens=8 * 197, in_features=768, block_row_count=48)
    )


def test_a_captured_graph_replays_the_kernel() -> None:
    case = Case(block_rows=64, block_cols=32)
    problem = layer(case)
    weight = to_tensors(problem.packed, None)
    x = torch.from_numpy(problem.x).cuda().view(torch.float16)
    expected = block_sparse_linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = block_sparse_linear(x, weight)
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_a_thread_that_asked_nothing_of_cuda_yet_can_launch() -> None:
    """Its output comes from torch's cache, so that the launch is its first call of the driver."""
    case = Case(block_rows=64, block_cols=32)
    problem = layer(case)
    weight = to_tensors(problem.packed, None)
    x = torch.from_numpy(problem.x).cuda().view(torch.float16)
    expected = block_sparse_linear(x, weight)
    block_sparse_linear(x, weight)  # freed at once: the cache has room for the thread's output
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(block_sparse_linear(x, weight)))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert len(found) == 1, "the thread raised"
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("setting", [*grid_settings()[::4], *schedules_of(Setting())], ids=str)
def test_a_setting_of_the_tuning_computes_the_layer(setting: Setting) -> None:
    needed("triton", reason="settings are compiled where they run")
    case = Case(block_rows=64, block_cols=16, epilogue="gelu")
    problem = layer(case)
    bias = torch.from_numpy(problem.bias).view(torch.float16).float().numpy()
    y = launch(
        setting,
        torch.from_numpy(problem.x).cuda().view(torch.float16),
        to_tensors(problem.packed, bias),
        multiprocessors=torch.cuda.get_device_properties(0).multi_processor_count,
        epilogue=case.epilogue,
    )
    assert_close(y.cpu().view(torch.uint16).numpy(), case, problem.expected)
