"""The CPU benchmarks' documents, and what they make of times. Nothing is timed."""

import json
import os
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")
timm = pytest.importorskip("timm")

from benchmarks import cpu_engine  # noqa: E402
from benchmarks.cpu_where_time_goes import kind_of  # noqa: E402
from benchmarks.vit_onnx import Gemm  # noqa: E402
from lpvit_engines.openvino_times import NodeTime, single_calls  # noqa: E402

WALL_MS = {
    "openvino": 20.0,
    "onnxruntime": 24.0,
    ("64x1", 0.5): 10.0,
    ("64x1", 0.8): 5.0,
    ("64x64", 0.5): 9.5,
    ("64x64", 0.8): 5.0,
}


def given_times(calls: dict[Any, Any], *, rounds: int) -> dict[Any, list[tuple[float, float]]]:
    """In the place of the clock: every engine answers once, its times are WALL_MS."""
    image = np.zeros((1, 3, 224, 224), np.float32)
    for call in calls.values():
        assert np.isfinite(call(image)).all()
    return {key: [(WALL_MS[key], 2 * WALL_MS[key])] * rounds for key in calls}


def layers(kept: float) -> list[Gemm]:
    return [Gemm(name="fc1", in_features=64, out_features=64, stored=round(64 * 64 * kept))]


def test_the_quick_run_prints_one_document_with_the_rows_that_are_promised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create = timm.create_model
    tiny = {"depth": 1, "embed_dim": 64, "num_heads": 1}
    monkeypatch.setattr(timm, "create_model", lambda name, **rest: create(name, **rest, **tiny))
    monkeypatch.setattr(cpu_engine, "alternate", given_times)
    monkeypatch.setattr(cpu_engine, "measured_peak_gflops", lambda precision: 100.0)
    monkeypatch.setattr(sys, "argv", ["cpu_engine.py", "--quick", "--json"])
    cpu_engine.main()
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "lpvit.bench.cpu/1"
    for row, sparsity, sparse_ms in zip(document["rows"], (0.5, 0.8), (10.0, 5.0), strict=True):
        promised = {
            "model": "deit_small",
            "precision": "float32",
            "pattern": "64x1",
            "sparsity": sparsity,
            "threads": os.cpu_count(),
            "dense_ms": 20.0,
            "dense_engine": "openvino",
            "sparse_ms": sparse_ms,
            "speedup": 20.0 / sparse_ms,
        }
        assert {key: row[key] for key in promised} == promised


def test_a_pattern_that_keeps_another_share_of_weights_is_not_held_against_64x1() -> None:
    gemms = {
        ("64x1", 0.5): layers(0.5),
        ("64x1", 0.8): layers(0.2),
        ("64x64", 0.5): layers(0.5),
        ("64x64", 0.8): layers(0.25),
    }
    times = {key: [(WALL_MS[key], 1.0)] * 3 for key in (*gemms, "openvino")}
    rows = list(cpu_engine.sparse_rows(times, {"openvino": 20.0, "lpvit-dense": 1.0}, gemms))
    assert [row["actual_sparsity"] for row in rows] == [0.5, 0.8, 0.5, 0.75]
    assert [row.get("over_64x1") for row in rows] == [
        None,
        None,
        {"ratio": 0.95, "quartiles": [0.95, 0.95]},
        None,
    ]


def test_single_calls_are_taken_out_of_the_counters_running_means() -> None:
    assert single_calls([10.0, 8.0, 7.0]).tolist() == [10.0, 6.0, 5.0]


@pytest.mark.parametrize(
    ("name", "kernel", "kind"),
    [
        ("/blocks/blocks.0/attn/qkv/MatMul", "lpvit_avx2 block 64x1", "our linear layers"),
        ("/blocks/blocks.0/attn/Reshape_1", "lpvit_avx2 attention 6 x 64", "our attention"),
        ("/blocks/blocks.0/attn/qkv/Add", "FullyConnected gemm_f32", "OpenVINO's linear layers"),
        ("/blocks/blocks.0/attn/Softmax", "Subgraph jit_f32", "OpenVINO's attention"),
        ("/blocks/blocks.0/attn/Transpose", "Transpose unknown_f32", "OpenVINO's attention"),
        ("/patch_embed/proj/Conv", "Convolution brgconv_f32", "patch embedding"),
        ("MVN_59", "MVN jit_f32", "LayerNorm"),
        ("/blocks/blocks.0/norm1/LayerNormalization", "Subgraph jit_f32", "LayerNorm"),
        ("/blocks/blocks.0/Add", "Subgraph jit_f32", "element-wise"),
        ("/Concat", "Concat ref_f32", "the rest"),
    ],
)
def test_a_nodes_time_goes_to_its_kind(name: str, kernel: str, kind: str) -> None:
    assert kind_of(NodeTime(name=name, originals=(), kernel=kernel, median_ms=1.0)) == kind
