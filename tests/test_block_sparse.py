"""The block-sparse record refuses what does not fit, and the native kernel equals float64."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines import native
from lpvit_engines.block_sparse import BlockSparseMatrix, reference
from lpvit_engines.native import PackedLayer, Precision, instruction_set, instruction_sets

TOLERANCE = 2e-6  # of the sum of absolute products: float32 accumulation, and the kernel's GELU
BLOCKS = [
    (1, 1), (2, 4), (4, 4), (8, 1), (8, 8), (12, 1), (16, 1), (16, 16), (20, 3), (24, 2),
    (32, 1), (32, 32), (40, 5), (48, 1), (48, 16), (64, 1), (64, 16), (64, 64), (72, 2), (96, 1),
]  # fmt: skip
TOKENS = [1, 3, 12, 65, 197]


def random_matrix(
    block_rows: int, block_cols: int, *, density: float, grid: tuple[int, int] = (5, 7)
) -> BlockSparseMatrix:
    rng = np.random.default_rng(block_rows * 1000 + block_cols)
    stored = rng.random(grid) < density
    stored[2] &= density == 1  # an empty block row, unless everything is stored
    weight = rng.standard_normal((grid[0] * block_rows, grid[1] * block_cols), dtype=np.float32)
    weight *= np.kron(stored, np.ones((block_rows, block_cols), np.float32))
    return BlockSparseMatrix.from_dense(weight, block_rows=block_rows, block_cols=block_cols)


def random_array(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32)


def run(layer: PackedLayer, x: NDArray[np.float32]) -> NDArray[np.float32]:
    out = np.full((*x.shape[:-1], layer.out_features), np.nan, np.float32)
    layer(x, out)
    return out


def assert_close(
    actual: NDArray[np.float32], expected: NDArray[np.float64], scale: NDArray[np.float64]
) -> None:
    assert np.abs(actual - expected).max() <= TOLERANCE * max(1.0, float(scale.max()))


def scale_of(x: NDArray[np.float32], matrix: BlockSparseMatrix) -> NDArray[np.float64]:
    """The sum of absolute products, which bounds the rounding error of every order of adding."""
    return np.asarray(np.abs(x).astype(np.float64) @ np.abs(matrix.to_dense()).T)


@pytest.fixture(params=instruction_sets())
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
def test_every_block_shape_equals_float64(block: tuple[int, int], isa: str) -> None:
    matrix = random_matrix(*block, density=0.5)
    bias = random_array(matrix.out_features)
    with PackedLayer(matrix, bias=bias, isa=isa) as layer:
        for tokens in TOKENS:
            x = random_array(tokens, matrix.in_features)
            assert_close(run(layer, x), reference(x, matrix, bias=bias), scale_of(x, matrix))


@pytest.mark.parametrize("block", [(64, 1), (64, 16), (32, 32), (8, 8), (20, 3)])
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_densities_zero_and_one_equal_float64(
    block: tuple[int, int], density: float, isa: str
) -> None:
    matrix = random_matrix(*block, density=density)
    assert matrix.density == density
    x = random_array(65, matrix.in_features)
    with PackedLayer(matrix, isa=isa) as layer:
        assert_close(run(layer, x), reference(x, matrix), scale_of(x, matrix))


def test_gelu_is_exact_within_two_millionths(isa: str) -> None:
    x = np.linspace(-12, 12, 20001, dtype=np.float32).reshape(-1, 1)
    identity = BlockSparseMatrix.from_dense(np.ones((1, 1), np.float32), block_rows=1, block_cols=1)
    with PackedLayer(identity, activation="gelu", isa=isa) as layer:
        error = np.abs(run(layer, x) - reference(x, identity, activation="gelu"))
    assert error.max() < 2e-6


def test_gelu_keeps_what_is_not_a_number(isa: str) -> None:
    x = np.array([[np.nan], [np.inf], [-np.inf], [1e30]], np.float32)
    identity = BlockSparseMatrix.from_dense(np.ones((1, 1), np.float32), block_rows=1, block_cols=1)
    with PackedLayer(identity, activation="gelu", isa=isa) as layer:
        y = run(layer, x)[:, 0]
    assert np.isnan(y[0])
    assert y[1] == np.inf
    assert abs(y[2]) < 2e-6
    assert y[3] == np.float32(1e30)


def test_arrays_may_lie_at_any_address(isa: str) -> None:
    matrix = random_matrix(64, 16, density=0.5)
    bias = random_array(matrix.out_features)
    with PackedLayer(matrix, bias=bias, activation="gelu", isa=isa) as layer:
        for offset in range(1, 17):  # in floats past wherever numpy put the buffer
            x = np.empty(offset + 13 * matrix.in_features, np.float32)[offset:].reshape(13, -1)
            x[:] = random_array(*x.shape)
            out = np.empty(offset + 13 * matrix.out_features, np.float32)[offset:].reshape(13, -1)
            layer(x, out)
            expected = reference(x, matrix, bias=bias, activation="gelu")
            assert_close(out, expected, scale_of(x, matrix))


def test_bias_and_gelu_follow_the_product_in_this_order(isa: str) -> None:
    matrix = random_matrix(64, 1, density=0.5)
    bias, x = random_array(matrix.out_features), random_array(2, 33, matrix.in_features)
    with PackedLayer(matrix, bias=bias, activation="gelu", isa=isa) as layer:
        expected = reference(x, matrix, bias=bias, activation="gelu")
        assert_close(run(layer, x), expected, scale_of(x, matrix))


THREADS_RUN = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int),
    ctypes.c_void_p,
)
CONCURRENCY = ctypes.CFUNCTYPE(ctypes.c_int)


class FakeThreads(ctypes.Structure):
    """LpvitThreads of native/layer.h, implemented in Python."""

    _fields_ = (("concurrency", CONCURRENCY), ("run", THREADS_RUN))


def backwards(count: list[int]) -> FakeThreads:
    """Three threads that run every task, last first, on the caller; counts the tasks."""

    def run(tasks: int, task: Callable[[int, int], None], context: int) -> None:
        count.append(tasks)
        for index in reversed(range(tasks)):
            task(context, index)

    return FakeThreads(CONCURRENCY(lambda: 3), THREADS_RUN(run))


@pytest.mark.parametrize("grid", [(1, 64), (3, 200), (48, 48)])
@pytest.mark.parametrize("tokens", [197, 1000])
def test_tasks_cover_every_output_once_in_any_order(
    grid: tuple[int, int], tokens: int, isa: str
) -> None:
    matrix = random_matrix(64, 16, density=0.5, grid=(max(grid[0], 3), grid[1]))
    x, count = random_array(tokens, matrix.in_features), list[int]()
    threads = backwards(count)
    with PackedLayer(matrix, isa=isa, threads=ctypes.addressof(threads)) as layer:
        split = run(layer, x)
    with PackedLayer(matrix, isa=isa) as layer:
        assert np.array_equal(split, run(layer, x))
    assert count == [12]


def test_a_dense_weight_survives_the_round_trip() -> None:
    weight = random_array(96, 30)
    weight[:32] = 0
    matrix = BlockSparseMatrix.from_dense(weight, block_rows=32, block_cols=5)
    assert matrix.row_ptr.tolist() == [0, 0, 6, 12]
    assert np.array_equal(matrix.to_dense(), weight)


def test_a_block_that_does_not_divide_is_refused_with_both_shapes() -> None:
    with pytest.raises(EngineError, match="a block of 7x1 does not divide a weight of 64x48"):
        BlockSparseMatrix.from_dense(random_array(64, 48), block_rows=7, block_cols=1)


def fields(**changes: object) -> dict[str, object]:
    """A 2x3 grid of 4x2 blocks with four of them stored, and what a test wants different."""
    good: dict[str, object] = {
        "values": np.ones((4, 4, 2), np.float32),
        "row_ptr": np.array([0, 3, 4], np.int32),
        "col_idx": np.array([0, 1, 2, 0], np.int32),
        "in_features": 6,
        "out_features": 8,
    }
    return good | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row_ptr": np.array([1, 3, 4], np.int32)}, r"row_ptr\[0\] is 1; it must be 0"),
        ({"row_ptr": np.array([0, 5, 4], np.int32)}, r"row_ptr\[2\] is 4, below row_ptr\[1\]"),
        ({"row_ptr": np.array([0, 3, 9], np.int32)}, r"row_ptr\[2\] is 9, but 4 blocks"),
        ({"row_ptr": np.array([0, 4], np.int32)}, "row_ptr has 2 entries; 2 block rows need 3"),
        ({"col_idx": np.array([0, 1, 3, 0], np.int32)}, r"col_idx\[2\] is 3; there are 3 block"),
        ({"col_idx": np.array([0, -1, 2, 0], np.int32)}, r"col_idx\[1\] is -1; there are 3"),
        ({"col_idx": np.array([0, 2, 2, 0], np.int32)}, r"col_idx\[2\] is 2, not above"),
        ({"col_idx": np.array([0, 1, 2], np.int32)}, "col_idx has 3 entries for 4 stored blocks"),
        ({"col_idx": np.array([0, 1, 2, 0], np.int64)}, "col_idx of .* is int64 of rank 1"),
        ({"values": np.ones((4, 8), np.float32)}, "values of .* is float32 of rank 2"),
        ({"values": np.ones((4, 4, 2), np.float64)}, "values of .* is float64 of rank 3"),
        ({"in_features": 7}, "blocks of 4x2 do not divide a weight of 8x7"),
        ({"in_features": 0}, "blocks of 4x2 do not divide a weight of 8x0"),
        ({"in_features": 2**20, "out_features": 2**12}, "2\\^31 elements or more"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_offset(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        BlockSparseMatrix(**fields(**changes))  # type: ignore[arg-type]


INDICES = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 5), max_size=6)


@settings(max_examples=300, deadline=None)
@given(row_ptr=INDICES, col_idx=INDICES, tokens=st.integers(1, 30))
def test_any_indices_are_refused_or_run_correctly(
    row_ptr: list[int], col_idx: list[int], tokens: int
) -> None:
    changes = {
        "row_ptr": np.array(row_ptr, np.int32),
        "col_idx": np.array(col_idx, np.int32),
        "values": np.ones((len(col_idx), 4, 2), np.float32),
    }
    try:
        matrix = BlockSparseMatrix(**fields(**changes))  # type: ignore[arg-type]
    except EngineError:
        return
    x = random_array(tokens, 6)
    with PackedLayer(matrix) as layer:
        assert_close(run(layer, x), reference(x, matrix), scale_of(x, matrix))


def test_the_environment_variable_forces_an_instruction_set(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LPVIT_ISA", isa)
    assert instruction_set() == isa
    with PackedLayer(random_matrix(8, 8, density=1)) as layer:
        assert layer.isa == isa


def test_an_instruction_set_that_the_machine_lacks_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LPVIT_ISA", "avx1024")
    with pytest.raises(
        EnvironmentUnfitError, match=r"LPVIT_ISA=avx1024, but this machine runs float32 on: "
    ):
        instruction_set()


@pytest.mark.parametrize(
    ("precision", "isa", "factor"), [("float32", "portable", 3), ("int8", "portable_int8", 7)]
)
def test_a_processor_with_nothing_but_the_portable_kernel_is_told_how_slow_that_is(
    precision: Precision, isa: str, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldProcessor:
        @staticmethod
        def lpvit_supports(isa: bytes) -> int:
            return int(isa.startswith(b"portable"))

    monkeypatch.delenv("LPVIT_ISA", raising=False)
    monkeypatch.setattr(native, "library", lambda: OldProcessor)
    slow = f"none of AVX-512, AVX2 and NEON.* about {factor} times as long as AVX2's"
    with pytest.warns(RuntimeWarning, match=slow):
        assert instruction_set(precision) == isa


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(EngineError, match=r"the bias is float32 of shape \(3,\)"):
        PackedLayer(random_matrix(8, 8, density=1), bias=random_array(3))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(EngineError, match="no activation 'relu' in the kernel"):
        PackedLayer(random_matrix(8, 8, density=1), activation="relu")  # type: ignore[arg-type]


def test_arrays_of_the_wrong_shape_or_order_never_reach_the_kernel() -> None:
    with PackedLayer(random_matrix(8, 8, density=1)) as layer:
        out = random_array(5, layer.out_features)
        with pytest.raises(EngineError, match="do not fit a layer of 56 in and 40 out"):
            layer(random_array(5, 55), out)
        with pytest.raises(EngineError, match="do not fit"):
            layer(random_array(6, 56), out)
        with pytest.raises(EngineError, match="both must be contiguous float32"):
            layer(random_array(56, 5).T, out)
        with pytest.raises(EngineError, match="out must be contiguous and writeable"):
            layer(random_array(5, 56), random_array(40, 5).T)


def test_a_closed_layer_says_so() -> None:
    layer = PackedLayer(random_matrix(8, 8, density=1))
    layer.close()
    layer.close()
    with pytest.raises(EngineError, match="this layer is closed"):
        run(layer, random_array(5, 56))
