"""The launcher against a fake libcuda: which binary loads where, and what reaches the kernel."""

import logging
from pathlib import Path

import pytest

from lpvit_edge.errors import EngineError, EnvironmentUnfitError, FileFormatError
from lpvit_engines.cuda.kernel import Kernel, open_kernel
from lpvit_engines.cuda.manifest import shipped_manifest
from tests.cuda.fake_driver import State, compile_fake_driver, state_of
from tests.cuda.layers import Case, assert_close, layer
from tests.cuda.ptx.launch import launch
from tests.cuda.ptx_run import Arguments, shipped_ptx


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def state(library: Path) -> State:
    return state_of(library)


def opened(library: Path, *, block_cols: int = 16, epilogue: str = "none") -> Kernel:
    return open_kernel(
        block_rows=64,
        block_cols=block_cols,
        dtype="float16",
        epilogue=epilogue,
        library=str(library),
    )


def start(kernel: Kernel, **changes: int) -> None:
    """Launch with made-up addresses, some changed."""
    given = {
        "x": 0x1000, "values": 0x2000, "rows": 0x3000, "columns": 0x4000, "bias": 0x5000,
        "residual": 0, "tokens": 197, "ldx": 768, "ldy": 3072, "y": 0x6000,
        "block_row_count": 48, "stream": 0x77,
    }  # fmt: skip
    kernel.launch(**(given | changes))


@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 110])
def test_a_known_architecture_gets_its_own_cubin(
    library: Path, state: State, capability: int
) -> None:
    state.capability = capability
    with opened(library) as kernel:
        assert kernel.target == f"sm_{capability}"
        assert kernel.note is None
        assert (state.cubin_loads, state.ptx_loads) == (1, 0)
        assert state.entry == b"block_sparse_linear"
    assert state.unloads == 1


@pytest.mark.parametrize("capability", [88, 100, 101, 103, 120, 121])
def test_an_unknown_architecture_gets_the_ptx_and_a_note_never_a_neighbours_cubin(
    library: Path, state: State, capability: int, caplog: pytest.LogCaptureFixture
) -> None:
    state.capability = capability
    with caplog.at_level(logging.WARNING), opened(library) as kernel:
        assert kernel.target == "ptx"
        assert kernel.note is not None
        assert f"{capability // 10}.{capability % 10}" in kernel.note
    assert (state.cubin_loads, state.ptx_loads) == (0, 1)
    assert kernel.note in caplog.text


def test_the_ptx_reaches_the_driver_whole_and_ends_in_a_zero(library: Path, state: State) -> None:
    state.capability = 120
    opened(library).close()
    variant = shipped_manifest().find(block_rows=64, block_cols=16, dtype="float16")
    assert state.ptx_length == variant.images["ptx"].size_bytes


@pytest.mark.parametrize("refusal", [200, 209])
def test_a_cubin_newer_than_the_driver_gives_way_to_the_ptx_with_a_note(
    library: Path, state: State, refusal: int
) -> None:
    state.cubin_result = refusal
    with opened(library) as kernel:
        assert kernel.target == "ptx"
        assert kernel.note == "CUDA driver 12060 refused the sm_87 cubin: using PTX"
    assert (state.cubin_loads, state.ptx_loads) == (1, 1)


def test_a_driver_too_old_for_the_ptx_is_told_in_words(library: Path, state: State) -> None:
    state.capability, state.ptx_result = 120, 222
    with pytest.raises(EnvironmentUnfitError, match=r"PTX newer than the driver.*CUDA 12\.0"):
        opened(library)


def test_a_driver_that_refuses_cubin_and_ptx_is_too_old(library: Path, state: State) -> None:
    state.cubin_result, state.ptx_result = 200, 222
    with pytest.raises(EnvironmentUnfitError, match=r"PTX newer than the driver.*CUDA 12\.0"):
        opened(library)
    assert (state.cubin_loads, state.ptx_loads) == (1, 1)


def test_a_kernel_that_cannot_be_set_up_is_unloaded_again(library: Path, state: State) -> None:
    state.capability, state.attribute_result = 90, 1  # sm_90 asks for more than 48 KiB
    with pytest.raises(EngineError, match="cuFuncSetAttribute answered CUresult 1"):
        opened(library)
    assert (state.cubin_loads, state.unloads) == (1, 1)


def test_a_gpu_before_ampere_is_refused_before_anything_loads(library: Path, state: State) -> None:
    state.capability = 72
    with pytest.raises(EnvironmentUnfitError, match=r"compute capability 7\.2.*need 8\.0"):
        opened(library)
    assert state.cubin_loads + state.ptx_loads == 0


def test_too_little_shared_memory_is_refused_with_both_numbers(library: Path, state: State) -> None:
    state.shared_limit = 32 * 1024
    needed = shipped_manifest().find(block_rows=64, block_cols=16, dtype="float16")
    shared_bytes = needed.images["sm_87"].shared_bytes
    with pytest.raises(EnvironmentUnfitError, match=f"needs {shared_bytes} bytes.*offers 32768"):
        opened(library)


def test_shared_memory_beyond_48_kib_is_asked_for(library: Path, state: State) -> None:
    opened(library).close()
    assert state.shared_attribute == 0  # sm_87 stays below
    state.capability = 90
    opened(library).close()
    variant = shipped_manifest().find(block_rows=64, block_cols=16, dtype="float16")
    assert state.shared_attribute == variant.images["sm_90"].shared_bytes
    assert state.shared_attribute > 48 * 1024


def test_without_a_context_the_remedy_is_named(library: Path, state: State) -> None:
    state.context_result = 201
    with pytest.raises(EnvironmentUnfitError, match="no current CUDA context"):
        opened(library)


def test_a_shape_without_a_kernel_is_refused_with_the_shapes_there_are(library: Path) -> None:
    with pytest.raises(EngineError, match=r"blocks of 64x24.*64x64, 64x32, 64x16, 64x8, 32x32"):
        opened(library, block_cols=24)


def test_a_missing_driver_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="NVIDIA driver"):
        opened(tmp_path / "libcuda.so.1")


def test_a_damaged_manifest_is_refused(library: Path, state: State, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "cuda_kernels", "format": 2}')
    with pytest.raises(FileFormatError, match="not a manifest of GPU kernels"):
        open_kernel(
            block_rows=64, block_cols=16, dtype="float16", library=str(library), binaries=tmp_path
        )


def test_the_grid_covers_all_tokens_and_the_block_is_exact(library: Path, state: State) -> None:
    with opened(library) as kernel:
        start(kernel, tokens=197, block_row_count=48, stream=0x1234_5678_9ABC)
    assert list(state.grid) == [48, 4, 1]
    assert list(state.block) == [128, 1, 1]
    assert state.stream == 0x1234_5678_9ABC
    assert state.shared_bytes == kernel.variant.images["sm_87"].shared_bytes


def test_no_tokens_launch_nothing(library: Path, state: State) -> None:
    with opened(library) as kernel:
        start(kernel, tokens=0)
    assert state.launches == 0


@pytest.mark.parametrize("name", ["x", "values", "rows", "columns", "bias", "y", "ldx", "ldy"])
def test_what_is_not_a_multiple_of_16_is_named(library: Path, state: State, name: str) -> None:
    with opened(library) as kernel, pytest.raises(EngineError, match=f"^{name} = 0x"):
        start(kernel, **{name: 0x1008})
    assert state.launches == 0


def test_a_batch_beyond_32_bits_is_refused(library: Path, state: State) -> None:
    with opened(library) as kernel, pytest.raises(EngineError, match="smaller batch"):
        start(kernel, tokens=2_000_000, ldx=768, ldy=3072)
    assert state.launches == 0


def test_a_negative_number_of_tokens_is_refused(library: Path, state: State) -> None:
    with opened(library) as kernel, pytest.raises(EngineError, match="-1 tokens"):
        start(kernel, tokens=-1)
    assert state.launches == 0


def test_more_tokens_than_a_grid_has_rows_are_refused(library: Path, state: State) -> None:
    with opened(library) as kernel:
        small = {"ldx": 16, "ldy": 64, "block_row_count": 1}
        start(kernel, tokens=65_535 * 64, **small)
        assert list(state.grid) == [1, 65_535, 1]
        with pytest.raises(EngineError, match="4194241 tokens: one launch computes up to 4194240"):
            start(kernel, tokens=65_535 * 64 + 1, **small)
    assert state.launches == 1


@pytest.mark.parametrize("count", [0, 47, 49])
def test_block_rows_that_do_not_make_the_outputs_are_refused(
    library: Path, state: State, count: int
) -> None:
    with opened(library) as kernel, pytest.raises(EngineError, match=f"{count} block rows of 64"):
        start(kernel, block_row_count=count)
    assert state.launches == 0


@pytest.mark.parametrize(("epilogue", "residual"), [("none", 0x7000), ("residual", 0)])
def test_a_residual_is_given_exactly_where_it_is_added(
    library: Path, state: State, epilogue: str, residual: int
) -> None:
    with opened(library, epilogue=epilogue) as kernel, pytest.raises(EngineError, match="residual"):
        start(kernel, residual=residual)
    assert state.launches == 0


def test_a_failed_launch_is_an_error_with_its_code(library: Path, state: State) -> None:
    state.launch_result = 719
    with opened(library) as kernel, pytest.raises(EngineError, match="CUresult 719"):
        start(kernel)


def test_closing_twice_unloads_once(library: Path, state: State) -> None:
    kernel = opened(library)
    kernel.close()
    kernel.close()
    assert state.unloads == 1


def test_a_closed_kernel_refuses_to_launch(library: Path, state: State) -> None:
    kernel = opened(library)
    kernel.close()
    with pytest.raises(EngineError, match=r"CUresult 400.*open the kernel again"):
        start(kernel)


@pytest.mark.parametrize("epilogue", ["none", "gelu", "residual"])
def test_what_the_launcher_passes_makes_the_shipped_ptx_compute_the_layer(
    library: Path, state: State, epilogue: str
) -> None:
    """Launcher, driver, PTX: the bytes that reach cuLaunchKernel go into the interpreter."""
    case = Case(block_rows=64, block_cols=16, epilogue=epilogue, tokens=70)  # type: ignore[arg-type]
    problem = layer(case)
    arguments = Arguments(case, problem)
    state.capability = 120
    with opened(library, epilogue=epilogue) as kernel:
        # A first launch with other numbers: nothing of it may remain in the prebuilt array.
        start(kernel, residual=0x7000 if epilogue == "residual" else 0)
        kernel.launch(
            x=arguments.x,
            values=arguments.values,
            rows=arguments.rows,
            columns=arguments.columns,
            bias=arguments.bias,
            residual=arguments.residual,
            tokens=case.tokens,
            ldx=case.in_features,
            ldy=arguments.out_features,
            y=arguments.y,
            block_row_count=len(problem.packed.rows),
            stream=0,
        )
    ptx, _ = shipped_ptx(case)
    launch(
        ptx,
        grid=(state.grid[0], state.grid[1]),
        threads=state.block[0],
        shared_bytes=state.shared_bytes,
        parameters=bytes(state.parameters[: state.parameter_bytes]),
        memory=arguments.memory,
    )
    assert_close(arguments.result(), case, problem.expected)
