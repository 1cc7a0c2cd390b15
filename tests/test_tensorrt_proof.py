"""The proof of sparsity and the reading of what TensorRT said, in its documented formats."""

import io
import json
import sys
import threading
from typing import Any

import pytest
from rich.console import Console

from lpvit_edge.errors import EngineError
from lpvit_edge.tensorrt_build import show
from lpvit_engines.tensorrt.build import made
from lpvit_engines.tensorrt.inspector import EngineLayer, engine_layers
from lpvit_engines.tensorrt.log import Line, Log, make_logger, memory_skips, refuse_overflow
from lpvit_engines.tensorrt.plan_file import DeviceKey, PlanManifest
from lpvit_engines.tensorrt.sparsity import (
    LayerProof,
    SparsityCount,
    confirm,
    count,
    is_plugin,
    table,
    verdict,
)
from lpvit_engines.tensorrt.times import group_times

SPARSE = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x64x64"
DENSE = "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x64"


def lines(*texts: str) -> list[Line]:
    return [Line("VERBOSE", text) for text in texts]


def built(layer: str = "fc1", kernel: str = SPARSE) -> EngineLayer:
    node = f"[ONNX Layer: {layer}/MatMul]\x1e[ONNX Layer: {layer}/Add]"
    record = {"Name": f"{layer}/MatMul_myl0_3", "TacticName": kernel, "Metadata": node}
    (found,) = engine_layers(json.dumps({"Layers": [record], "Bindings": []}))
    return found


def judged(
    dense_ms: float = 0.2, sparse_ms: float = 0.1, kernel: str = SPARSE, pattern: str = "2:4"
) -> LayerProof:
    return verdict(
        layer="fc1",
        pattern=pattern,
        dense_ms=dense_ms,
        sparse_ms=sparse_ms,
        spread_ms=0.01,
        sparse_layers=[built(kernel=kernel)],
    )


def test_the_last_pair_of_counts_is_taken() -> None:
    log = lines(
        "(Sparsity) Found 4 layer(s) eligible to use sparse tactics",
        "(Sparsity) Chose 1 layer(s) using sparse tactics",
        "(Sparsity) Found 12 layer(s) eligible to use sparse tactics",
        "(Sparsity) Chose 11 layer(s) using sparse tactics",
    )
    assert count(log) == SparsityCount(eligible=12, chosen=11)
    assert count(lines("nothing of the kind")) == SparsityCount(eligible=None, chosen=None)


def test_a_layer_is_kept_that_runs_sparse_and_wins() -> None:
    assert judged().kept
    assert judged().kernel == SPARSE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernel": DENSE}, "TensorRT chose a dense kernel"),
        ({"sparse_ms": 0.195}, "0.1950 ms sparse against 0.2000 ms dense"),
        ({"sparse_ms": 0.3}, "0.3000 ms sparse against 0.2000 ms dense"),
    ],
)
def test_a_layer_that_does_not_win_is_reverted_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    proof = judged(**changes)
    assert not proof.kept
    assert reason in (proof.reason or "")


def test_eligible_but_not_chosen_in_the_whole_network_is_said() -> None:
    (proof,) = confirm([judged()], [built(kernel=DENSE)], SparsityCount(eligible=39, chosen=0))
    assert not proof.kept
    assert proof.kernel == DENSE
    assert "(eligible 39, chosen 0)" in (proof.reason or "")
    (kept,) = confirm([judged()], [built()], SparsityCount(eligible=1, chosen=1))
    assert kept.kept


def test_the_table_names_layers_times_kernels_and_verdicts() -> None:
    manifest = PlanManifest(
        kind="tensorrt-plan", format=1, onnx_sha256="", plan_sha256="",
        device=DeviceKey(gpu="Orin", compute_capability="8.7", multiprocessors=8, memory_gib=8,
                         tensorrt="10.3.0"),
        cuda_driver=12060, precision="float16", strongly_typed=True,
        sparsity=SparsityCount(eligible=2, chosen=1), memory_skips=0,
        proofs=(judged(), judged(sparse_ms=0.3)), layers=(),
    )  # fmt: skip
    text = io.StringIO()
    show(manifest, Console(file=text, width=200))
    for expected in ("fc1", "2:4", "0.2000", "0.1000", SPARSE, "kept", "dense: 0.3000 ms sparse"):
        assert expected in text.getvalue()
    assert "2 layers eligible, 1 run sparse" in text.getvalue()


def test_fused_layers_share_one_time_and_say_so() -> None:
    fused = EngineLayer(
        name="g", kernel=DENSE, originals=("fc1/MatMul", "act/Gelu.0", "fc2"), sparse=False
    )
    samples = {"g": [9.0, 1.0, 3.0, 2.0], "reformat": [0.5]}
    group, other = group_times(samples, [fused], ["fc1", "fc2", "qkv"])
    assert (group.layers, group.median_ms, group.is_fused) == (("fc1", "fc2"), 2.0, True)
    assert (other.layers, other.median_ms, other.is_fused) == ((), 0.5, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({"Layers": ["fc1", "fc2"]}), "without detailed profiling verbosity"),
        ("no json", "gave no list of layers"),
    ],
)
def test_an_inspection_that_proves_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        engine_layers(text)


def test_a_warning_of_overflow_in_a_layer_norm_is_an_error() -> None:
    warning = "Running layernorm after self-attention with FP16 Reduce or Pow may cause overflow"
    with pytest.raises(EngineError, match="would answer wrongly"):
        refuse_overflow([Line("WARNING", warning)])
    refuse_overflow([Line("WARNING", "Running layernorm in FP32")])


def test_a_failure_carries_tensorrts_words_and_the_fitting_remedy() -> None:
    log = Log()
    log.add("VERBOSE", "chatter")
    log.add("ERROR", "Cannot find plugin: BlockSparseLinear, version: 2, namespace: lpvit")
    assert [line.severity for line in log.lines] == ["ERROR"]
    text = str(log.failure("no engine", "report it"))
    assert "Cannot find plugin: BlockSparseLinear, version: 2" in text
    assert "build it again with this version" in text
    short = Log()
    short.add("ERROR", "Requested amount of GPU memory could not be allocated")
    assert "free memory on the device" in str(short.failure("no engine", "report it"))
    for number in range(8):
        short.add("ERROR", f"of another kind, {number}")
    assert "To do: report it" in str(short.failure("no engine", "report it"))
    assert "TensorRT said: nothing. To do: report it" in str(Log().failure("x", "report it"))


def test_a_kernel_without_memory_is_counted_once_however_often_tensorrt_says_so() -> None:
    newer = lines(
        "Requested amount of GPU memory (2833252352 bytes) could not be allocated. There may not",
        "UNSUPPORTED_STATE: Skipping tactic 28 due to insufficient memory on requested size of 28",
        "[virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (Requested size was 2833252352)",
        "fine",
    )
    older = lines(
        "Tactic Device request: 414MB Available: 216MB. Device memory is insufficient to use",
        "Skipping tactic 3 due to insuficient memory on requested size of 2218 detected for tacti",
    )
    assert memory_skips(newer) == 1
    assert memory_skips(older) == 1
    assert memory_skips(older[:1]) == 1
    assert memory_skips(lines("fine")) == 0
    log = Log()
    for line in older:
        log.add("VERBOSE", line.text)
    assert memory_skips(log.lines) == 1


def test_a_layer_whose_name_tensorrt_lost_is_not_called_dense() -> None:
    unseen = SparsityCount(eligible=None, chosen=None)
    (block,) = confirm([judged(pattern="64x16")], [], unseen)
    assert block.kept
    assert block.reason == "built sparse; not seen in the engine, where TensorRT lost its name"
    assert table([block])[0][-1].startswith("kept: built sparse")
    (two_four,) = confirm([judged(pattern="2:4")], [], SparsityCount(eligible=4, chosen=0))
    assert not two_four.kept  # the log says that none was chosen


def test_a_plugin_is_known_by_its_type_where_it_has_a_tactic_too() -> None:
    text = json.dumps({"Layers": [{"Name": "x", "TacticName": "0x1", "LayerType": "PluginV3"}]})
    (layer,) = engine_layers(text)
    assert is_plugin(layer)


def test_what_tensorrt_cannot_make_is_an_error_in_words() -> None:
    class Builder:
        def __init__(self, _: object) -> None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    log = Log()
    words = "could not make its Builder. TensorRT said: pybind11::init.*lpvit doctor"
    with pytest.raises(EngineError, match=words):
        made("Builder", lambda: Builder(None), log=log)

    with pytest.raises(EngineError, match="could not make its network"):
        made("network", lambda: None, log=Log())


def test_one_logger_of_the_process_fills_every_log_that_lives() -> None:
    class Module:
        class ILogger:
            pass

    class Severity:
        name = "ERROR"

    first, second = Log(), Log()
    logger = make_logger(Module, first)
    assert make_logger(Module, second) is logger
    logger.log(Severity, "both hear it")
    del first
    logger.log(Severity, "one is left")
    assert second.faults == ["both hear it", "one is left"]


def test_a_log_may_begin_while_tensorrts_threads_speak() -> None:
    class Module:
        class ILogger:
            pass

    class Severity:
        name = "INFO"

    logs = [Log() for _ in range(50)]
    (logger,) = {make_logger(Module, log) for log in logs}
    done = threading.Event()

    def begin() -> None:
        while not done.is_set():
            make_logger(Module, Log())

    thread = threading.Thread(target=begin)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # without a lock a set that grows is met within 100 messages
    thread.start()
    try:
        for _ in range(500):
            logger.log(Severity, "said")
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(len(log.lines) == 500 for log in logs)
