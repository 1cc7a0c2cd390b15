"""Every shipped kernel on a real GPU, against float64. Nothing else here runs on hardware.

LPVIT_REQUIRE_HARDWARE=cuda turns the skip into a failure on a machine that is meant to have a GPU.
"""

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the GPU is reached through torch")

from benchmarks.gpu_records import Setting  # noqa: E402
from benchmarks.gpu_settings import grid_settings, launch, schedules_of  # noqa: E402
from lpvit_engines.cuda.manifest import Variant, shipped_manifest  # noqa: E402
from lpvit_engines.cuda.torch_op import block_sparse_linear, to_tensors  # noqa: E402
from tests.cuda.layers import Case, assert_close, layer  # noqa: E402

pytestmark = [
    pytest.mark.hardware("cuda"),
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("LPVIT_REQUIRE_HARDWARE") != "cuda",
        reason="no CUDA device",
    ),
]
VARIANTS = shipped_manifest().variants


def run(case: Case) -> None:
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
    run(
        Case(
            block_rows=variant.block_rows,
            block_cols=variant.block_cols,
            dtype=variant.dtype,
            epilogue=variant.epilogue,
            tokens=tokens,
        )
    )


def test_a_layer_of_deit_b_at_batch_8() -> None:
    run(Case(block_rows=64, block_cols=16, tokens=8 * 197, in_features=768, block_row_count=48))


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


@pytest.mark.parametrize("setting", [*grid_settings()[::4], *schedules_of(Setting())], ids=str)
def test_a_setting_of_the_tuning_computes_the_layer(setting: Setting) -> None:
    pytest.importorskip("triton", reason="settings are compiled where they run")
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
