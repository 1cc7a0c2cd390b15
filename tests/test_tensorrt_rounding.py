"""What float16 explains, and layers that lose only in the whole network."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt.build import Built
from lpvit_engines.tensorrt.inspector import EngineLayer
from lpvit_engines.tensorrt.making import _settled
from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy
from lpvit_engines.tensorrt.rounding import emulated, half_tolerance, longest_chain
from lpvit_engines.tensorrt.sparsity import LayerProof, SparsityCount, table


@pytest.fixture
def tiny(tiny_project: Path) -> tuple[Any, Path, Any]:
    """(torch model, its portable file, four images)."""
    import torch

    from lpvit_edge.export import export_onnx
    from lpvit_edge.layers import walk
    from lpvit_edge.models import load_model

    module: Any = load_model(str(tiny_project / "model.toml"), weights=None).module
    path = tiny_project / "model.onnx"
    export_onnx(module, walk(module, image_size=32), {}, path, image_size=32)
    return module, path, torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_longest_chain_counts_operators_from_input_to_output() -> None:
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    nodes = [
        helper.make_node("Neg", ["x"], ["a"]),
        helper.make_node("Abs", ["a"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["y"]),
        helper.make_node("Exp", ["y"], ["unused"]),
    ]
    assert (
        longest_chain(helper.make_model(helper.make_graph(nodes, "g", value[:1], value[1:]))) == 3
    )


def test_the_float16_copy_is_within_its_tolerance_and_not_within_float32s(
    tiny: tuple[Any, Path, Any],
) -> None:
    import torch

    module, path, images = tiny
    portable = onnx.load(path)
    with torch.no_grad():
        reference: NDArray[np.float32] = module(images).numpy()
    error = np.abs(emulated(portable, images.numpy()) - reference).max()
    error /= np.abs(reference).max()
    assert 1e-5 < error < half_tolerance(portable) < 0.02


def test_a_wrong_weight_in_the_engines_copy_is_refused_before_anything_is_built(
    tiny: tuple[Any, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lpvit_edge.export import compare_runtimes

    module, path, images = tiny

    def wrong_copy(portable: Any, **given: Any) -> Any:
        wrong = next(x for x in portable.graph.initializer if list(x.dims) == [64, 64])
        wrong.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(wrong) * 1.5, wrong.name))
        return tensorrt_copy(portable, **given)

    monkeypatch.setattr("lpvit_engines.tensorrt.rounding.tensorrt_copy", wrong_copy)
    monkeypatch.setattr("lpvit_edge.tensorrt_build.build_proven", lambda *_, **__: pytest.fail("x"))
    with pytest.raises(EngineError, match="the float16 copy differs from the torch model"):
        compare_runtimes(module, path, images, engine="tensorrt", threads=1, tolerance=1e-3)


def proof(layer: str) -> LayerProof:
    return LayerProof(
        layer=layer, pattern="2:4", dense_ms=1.0, sparse_ms=0.5, kernel="spmma", kept=True
    )


def test_a_layer_that_wins_alone_but_runs_dense_in_the_network_is_rebuilt_dense_and_said() -> None:
    asked: list[frozenset[str]] = []

    def build_whole(portable: Any, patterns: dict[str, str], dense: frozenset[str]) -> Built:
        asked.append(dense)
        kernels = {"fc1": "sm80_xmma_sparse_gemm", "fc2": "sm80_xmma_gemm"}
        layers = tuple(
            EngineLayer(name=n, kernel=k, originals=(f"{n}/MatMul",), sparse="sparse" in k)
            for n, k in kernels.items()
        )
        counted = SparsityCount(eligible=2, chosen=1)
        return Built(
            plan=b"plan",
            layers=layers,
            sparsity=counted,
            strongly_typed=True,
            memory_skips=0,
            python_free=True,
        )

    proofs = (proof("fc1"), proof("fc2"), proof("lost"))
    patterns = {p.layer: p.pattern for p in proofs}
    _, confirmed = _settled(build_whole, None, patterns, proofs)
    assert asked == [frozenset(), frozenset({"fc2"})]  # what TensorRT lost sight of is left alone
    verdicts = {row[0]: row[-1] for row in table(confirmed)}
    assert verdicts["fc1"] == "kept"
    assert verdicts["fc2"].startswith("dense: TensorRT chose a dense kernel for it in the whole")
