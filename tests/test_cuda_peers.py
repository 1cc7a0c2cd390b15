"""The kernels that ours are compared with get settings that are fair to them. They need a GPU; here
they are computed densely."""

from functools import cache, partial
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the benchmark compares torch's kernels")

from benchmarks import gpu_contestants, gpu_kernels  # noqa: E402
from benchmarks.gpu_contestants import bsr_weights, torch_bsr, two_of_four  # noqa: E402
from benchmarks.gpu_rounds import refusals  # noqa: E402
from lpvit_edge.errors import EngineError, LpvitEdgeError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Sparse BSR tensor support")


def small() -> gpu_contestants.Problem:
    return gpu_contestants.problem(
        out_features=128, in_features=256, tokens=20, dtype="float16", copies=2, device="cpu"
    )


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch's block-sparse kernel was asked for."""
    asked: list[Any] = []

    def addmm(base: Any, bsr: Any, columns: Any, *, beta: int, out: Any, meta: Any) -> None:
        assert (beta, columns.shape[1]) == (0, 64)
        asked.append(meta)
        out.copy_(bsr.to_dense().float() @ columns.float())

    monkeypatch.setattr("torch.sparse._triton_ops.bsr_dense_addmm", addmm)
    monkeypatch.setattr(gpu_contestants, "require", lambda module: None)
    return asked


@pytest.mark.parametrize("stages", [None, 5, 7])
def test_torchs_kernel_gets_its_tokens_padded_and_its_result_turned_round(
    settings: list[Any], stages: int | None
) -> None:
    weights = partial(bsr_weights, block=64, density=0.5)
    made = torch_bsr(small(), weights=weights, stages=stages)
    found = made.run(1)
    assert found.shape == (20, 128)
    assert gpu_kernels.relative_error(found, made) < 2e-3
    assert settings == [
        None
        if stages is None
        else {"SPLIT_N": 1, "GROUP_SIZE_ROW": 4, "num_stages": stages, "num_warps": 4}
    ]


def test_torchs_own_tuner_chooses_before_the_capture(
    settings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"SPLIT_N": 1, "GROUP_SIZE_ROW": 2, "num_stages": 6, "num_warps": 8}

    def tune(base: Any, bsr: Any, columns: Any, *, beta: int, out: Any) -> dict[str, int]:
        assert (beta, columns.shape, bsr.shape) == (0, (256, 64), (128, 256))
        return chosen

    monkeypatch.setattr("torch.sparse._triton_ops_meta.tune_bsr_dense_addmm", tune)
    made = torch_bsr(small(), weights=partial(bsr_weights, block=32, density=0.5), tuned=True)
    assert settings == []
    made.run(0)
    assert settings == [chosen]


def test_the_ways_to_run_one_block_sparse_weight_share_it_and_not_their_results(
    settings: list[Any],
) -> None:
    given, weights = small(), cache(partial(bsr_weights, block=64, density=0.5))
    first, second = (torch_bsr(given, weights=weights, stages=n) for n in (5, 7))
    assert first.expected is second.expected
    assert first.run(0).data_ptr() != second.run(0).data_ptr()


def test_a_machine_without_triton_refuses_torchs_kernel_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(LpvitEdgeError, match="cannot import triton") as refused:
        torch_bsr(small(), weights=partial(bsr_weights, block=64, density=0.5))
    assert isinstance(refused.value, refusals())


def semi_structured(weight: Any, *, backend: str) -> Any:
    """A dense tensor with the names of a semi-structured one."""
    made = weight.clone()
    made.BACKEND, made.packed = backend, weight
    return made


def test_cusparselt_gets_its_tokens_padded_and_searches_its_algorithm_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []

    def convert(weight: Any) -> Any:
        made.append(semi_structured(weight, backend="cusparselt"))
        return made[-1]

    def search(packed: Any, columns: Any, bias: Any) -> int:
        assert (packed.shape, columns.shape, bias.shape) == ((128, 256), (256, 24), (128,))
        return 3

    monkeypatch.setattr("torch.sparse.to_sparse_semi_structured", convert)
    monkeypatch.setattr("torch._cslt_sparse_mm_search", search, raising=False)
    contestant = two_of_four(small())
    assert [copy.alg_id_cusparselt for copy in made] == [3, 3]
    found = contestant.run(0)
    assert found.shape == (20, 128)
    assert gpu_kernels.relative_error(found, contestant) < 2e-3


def test_2_4_by_another_library_is_not_measured_under_cusparselts_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "torch.sparse.to_sparse_semi_structured", partial(semi_structured, backend="cutlass")
    )
    with pytest.raises(EngineError, match="by cutlass here"):
        two_of_four(small())
