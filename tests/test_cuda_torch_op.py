"""The torch operator: its CPU side, its tracing, and what its CUDA side hands to the launcher."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the operator is a torch operator")

from lpvit_edge.errors import EngineError, LpvitEdgeError, ModelError  # noqa: E402
from lpvit_engines.cuda import torch_checks  # noqa: E402
from lpvit_engines.cuda.half import Bits  # noqa: E402
from lpvit_engines.cuda.kernel import Kernel, open_kernel  # noqa: E402
from lpvit_engines.cuda.torch_op import (  # noqa: E402
    WeightTensors,
    block_sparse_linear,
    launch_on_tensors,
    register,
    to_tensors,
)
from tests.cuda.fake_driver import State, compile_fake_driver, state_of  # noqa: E402
from tests.cuda.layers import Case, Layer, assert_close, layer  # noqa: E402

CASE = Case(block_rows=64, block_cols=16, tokens=12)


def half(bits: Bits, dtype: str) -> Any:
    return torch.from_numpy(bits).view(getattr(torch, dtype))


def on_cpu(problem: Layer, *, bias: Any = None) -> WeightTensors:
    return to_tensors(problem.packed, bias, device="cpu")


def bias_of(problem: Layer, dtype: str) -> Any:
    return half(problem.bias, dtype).float().numpy()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("epilogue", ["none", "gelu", "residual"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 8), (32, 32)])
def test_the_operator_computes_the_layer_on_the_cpu(
    shape: tuple[int, int], epilogue: Any, dtype: Any
) -> None:
    case = Case(block_rows=shape[0], block_cols=shape[1], tokens=12, epilogue=epilogue, dtype=dtype)
    problem = layer(case)
    y = block_sparse_linear(
        half(problem.x, dtype).reshape(3, 4, -1),
        on_cpu(problem, bias=bias_of(problem, dtype)),
        activation="gelu" if epilogue == "gelu" else "none",
        residual=half(problem.residual, dtype).reshape(3, 4, -1)
        if epilogue == "residual"
        else None,
    )
    assert y.shape == (3, 4, problem.packed.out_features)
    found = y.reshape(12, -1).view(torch.uint16).numpy()
    assert_close(found, case, problem.expected)


def test_torch_accepts_the_operator_as_well_behaved() -> None:
    problem = layer(CASE)
    weight = on_cpu(problem)
    arguments = (
        half(problem.x, "float16"), weight.values, weight.rows, weight.columns, weight.bias,
        None, weight.in_features, weight.block_cols, "none",
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(register(), arguments, test_utils=checks).values()) == {
        "SUCCESS"
    }


def test_a_missing_bias_is_zeros() -> None:
    assert on_cpu(layer(CASE)).bias.tolist() == [0.0] * 192


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (np.zeros(191), EngineError, r"shape \(191,\), the weight has 192 rows"),
        (np.full(192, np.inf), ModelError, "not finite"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(
    bias: Any, error: type[LpvitEdgeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        on_cpu(layer(CASE), bias=bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(12, 240, dtype=torch.float16)},
            r"x has the shape \(12, 240\), the weight takes 256 features",
        ),
        ({"x": torch.zeros((), dtype=torch.float16)}, r"x has the shape \(\),"),
        ({"x": torch.zeros(12, 256)}, r"x is torch\.float32 on cpu"),
        ({"activation": "relu"}, "'relu' is unknown"),
        (
            {"residual": torch.zeros(12, 192, dtype=torch.float16), "activation": "gelu"},
            "no kernel adds a residual after gelu",
        ),
        ({"residual": torch.zeros(11, 192, dtype=torch.float16)}, r"must be .*\(12, 192\)"),
        ({"residual": torch.zeros(12, 192)}, r"residual is torch\.float32"),
    ],
)
def test_tensors_that_do_not_fit_the_weight_are_refused(
    change: dict[str, Any], message: str
) -> None:
    problem = layer(CASE)
    given: dict[str, Any] = {"x": half(problem.x, "float16"), "weight": on_cpu(problem)}
    with pytest.raises(EngineError, match=message):
        block_sparse_linear(**(given | change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("values", lambda part: part.flatten(1)),
        ("values", lambda part: part.reshape(-1, 64, 32)),
        ("rows", lambda part: part[:-1]),
        ("rows", lambda part: part.long()),
        ("rows", lambda part: part.t().contiguous().t()),
        ("columns", lambda part: part[:-1]),
        ("columns", lambda part: part.float()),
        ("bias", lambda part: part[:-1]),
        ("bias", lambda part: part.float()),
        ("block_cols", lambda _: 32),
        ("block_cols", lambda _: 0),
    ],
)
def test_weight_tensors_that_contradict_each_other_are_refused(name: str, change: Any) -> None:
    problem = layer(CASE)
    weight = on_cpu(problem)
    changed = replace(weight, **{name: change(getattr(weight, name))})
    with pytest.raises(EngineError, match=r"contradict each other.*pass what to_tensors returned"):
        block_sparse_linear(half(problem.x, "float16"), changed)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def state(library: Path) -> State:
    return state_of(library)


@pytest.fixture
def kernel(library: Path, state: State) -> Iterator[Kernel]:
    variant: dict[str, Any] = {"block_rows": 64, "block_cols": 16, "dtype": "float16"}
    with open_kernel(**variant, library=str(library)) as opened:
        yield opened


def test_the_launcher_gets_the_addresses_and_sizes_of_the_tensors(
    kernel: Kernel, state: State
) -> None:
    problem = layer(CASE)
    weight = on_cpu(problem)
    x = half(problem.x, "float16").reshape(3, 4, 256)
    y = launch_on_tensors(
        kernel, x, weight.values, weight.rows, weight.columns, weight.bias, None, stream=7
    )
    tensors = (x, weight.values, weight.rows, weight.columns, weight.bias)
    assert y.shape == (3, 4, 192)
    assert struct.unpack("<6Q3i4x3Q", bytes(state.parameters[: state.parameter_bytes])) == (
        *(tensor.data_ptr() for tensor in tensors), 0, 12, 256, 192, y.data_ptr(), 0, 0,
    )  # fmt: skip
    assert list(state.grid) == [3, 1, 1]
    assert state.stream == 7


def test_a_weight_is_checked_at_its_first_call_and_another_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A check costs as much as a launch. What it remembers is these tensors, not their shapes."""
    checked: list[int] = []
    check = torch_checks.check_weight

    def noted(*parts: Any, block_cols: int) -> None:
        checked.append(block_cols)
        check(*parts, block_cols=block_cols)

    monkeypatch.setattr(torch_checks, "check_weight", noted)
    problem = layer(CASE)
    x, weight = half(problem.x, "float16"), on_cpu(problem)
    for _ in range(3):
        block_sparse_linear(x, weight)
    assert checked == [16]
    block_sparse_linear(x, replace(weight, bias=weight.bias.clone()))
    assert checked == [16, 16]
    for change in ({"bias": weight.bias[:-1]}, {"block_cols": 32}, {"rows": weight.rows.long()}):
        with pytest.raises(EngineError, match="contradict each other"):
            block_sparse_linear(x, replace(weight, **change))


def test_a_gradient_through_the_operator_is_refused_and_not_silently_missing() -> None:
    problem = layer(CASE)
    x = half(problem.x, "float16").requires_grad_()
    y = block_sparse_linear(x, on_cpu(problem))
    with pytest.raises(EngineError, match="compute no gradients"):
        y.float().sum().backward()  # type: ignore[no-untyped-call]
