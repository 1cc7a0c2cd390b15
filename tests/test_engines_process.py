"""What the OpenVINO engine does to its process: whose threads it uses, and what memory it keeps."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from lpvit_edge.errors import EnvironmentUnfitError
from lpvit_engines import load_engine, native_library, openvino_node
from lpvit_engines.block_sparse import BlockSparseMatrix
from tests.native.onnx_models import random_input, random_matrix, save, sparse_model

ROOT = Path(__file__).parent.parent
FEATURES = 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sparse layer, all of whose 64 MiB of weights are stored."""
    weight = np.ones((FEATURES, FEATURES), np.float32)
    matrix = BlockSparseMatrix.from_dense(weight, block_rows=64, block_cols=16)
    path = tmp_path_factory.mktemp("process") / "large.onnx"
    return sparse_model(path, [matrix], shape=[65, FEATURES])


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints for a piece of code."""
    paths = [str(ROOT / folder) for folder in (".", "engines", "profilers")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {paths!r}\n{code}", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_weights_stay_in_memory_once(model: Path) -> None:
    code = """
import gc, pathlib, psutil
import numpy as np
from lpvit_engines import load_engine
small, large = (pathlib.Path(name) for name in sys.argv[1:])
process = psutil.Process()
with load_engine("openvino", small, threads=1) as engine:
    engine.infer(np.zeros(engine.input_shape, np.float32))
before = process.memory_info().rss
with load_engine("openvino", large, threads=1) as engine:
    engine.infer(np.zeros(engine.input_shape, np.float32))
    gc.collect()
    print(process.memory_info().rss - before)
"""
    pytest.importorskip("psutil")
    small = model.with_name("small.onnx")
    shape = [65, FEATURES]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    node = helper.make_node("Relu", ["x"], ["y"])
    save(helper.make_graph([node], "small", ends[:1], ends[1:]), small)
    weight_bytes = FEATURES * FEATURES * 4
    grown = int(run_python(code, str(small), str(model)))
    assert weight_bytes < grown < 1.6 * weight_bytes


@pytest.mark.parametrize("precisions", [("float32", "float32"), ("float32", "int8")])
def test_two_engines_in_one_process_answer_as_each_alone(
    precisions: tuple[str, str], tmp_path: Path
) -> None:
    x = random_input(1, 197, 192)
    paths = [
        sparse_model(
            tmp_path / f"{out}.onnx",
            [random_matrix(out, 192, (64, 1)), random_matrix(192, out, (64, 1))],
            shape=[1, 197, 192],
            activation="gelu",
        )
        for out in (768, 384)
    ]
    with (
        load_engine("openvino", paths[0], threads=2, precision=precisions[0]) as first,
        load_engine("openvino", paths[1], threads=2, precision=precisions[1]) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        alone = [engine.infer(x) for engine in (first, second)]
        turns = [engine.infer(x) for _ in range(5) for engine in (first, second)]
        # An engine takes one call at a time; the two work at the same time.
        beside = pool.map(lambda engine: [engine.infer(x) for _ in range(25)], (first, second))
        found = turns + [y for pair in zip(*beside, strict=True) for y in pair]
    assert not np.array_equal(alone[0], alone[1])
    assert len(found) == 60
    assert all(np.array_equal(y, alone[index % 2]) for index, y in enumerate(found))


def test_the_kernel_runs_on_the_thread_pool_that_openvino_brought() -> None:
    code = """
import openvino
from pathlib import Path
from lpvit_engines.native_library import tbb_threads
tbb_threads()
lines = Path("/proc/self/maps").read_text().splitlines()
pools = {line.split()[-1] for line in lines if "libtbb.so" in line}
print(pools == {str(Path(openvino.__file__).parent.resolve() / "libs" / "libtbb.so.12")}, pools)
"""
    assert run_python(code).startswith("True")


@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_gets_as_many_threads_as_the_engine(threads: int, model: Path) -> None:
    code = """
import ctypes, pathlib
import numpy as np, openvino
from lpvit_engines import native_library, openvino_engine
CONCURRENCY = ctypes.CFUNCTYPE(ctypes.c_int)
class Threads(ctypes.Structure):
    _fields_ = [("concurrency", CONCURRENCY), ("run", ctypes.c_void_p)]
real = Threads.from_address(native_library.tbb_threads())
seen = set()
def concurrency():
    seen.add(real.concurrency())
    return real.concurrency()
spy = Threads(CONCURRENCY(concurrency), real.run)
openvino_engine._thread_table = lambda: ctypes.addressof(spy)
engine = openvino_engine.OpenVinoEngine(pathlib.Path(sys.argv[1]), threads=int(sys.argv[2]))
engine.infer(np.zeros(engine.input_shape, np.float32))
print(seen)
"""
    if sys.platform == "linux" and len(os.sched_getaffinity(0)) < threads:
        pytest.skip(f"needs {threads} cores")
    assert run_python(code, str(model), str(threads)) == f"{{{threads}}}"


def test_a_native_operator_for_another_openvino_falls_back_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openvino_node, "NATIVE_OPERATOR", tmp_path / "_openvino_node.so")
    assert openvino_node.native_operators.__wrapped__() is None
    assert "sparse nodes run through Python" in caplog.text


@pytest.mark.parametrize(
    ("source", "found"),
    [("int lpvit_interface(void) { return 1; }", "interface 1"), ("", "of an older version")],
)
def test_a_library_of_another_interface_is_refused_before_it_computes_nonsense(
    source: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stale.c").write_text(source)
    stale = tmp_path / "_block_sparse.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", stale, tmp_path / "stale.c"], check=True)
    monkeypatch.setattr(native_library, "_FOLDER", tmp_path)
    with pytest.raises(EnvironmentUnfitError, match=found):
        native_library.library.__wrapped__()


def test_threads_may_run_on_any_core_while_they_compute(model: Path) -> None:
    """A thread bound to the core of another engine's would wait for it."""
    code = """
import os, pathlib, threading
import numpy as np
from lpvit_engines import load_engine
own, others = os.sched_getaffinity(0), set()
with load_engine("openvino", pathlib.Path(sys.argv[1]), threads=1) as engine:
    x = np.zeros(engine.input_shape, np.float32)
    def work():
        for _ in range(20):
            engine.infer(x)
    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        for task in os.listdir("/proc/self/task"):
            try:
                others.add(frozenset(os.sched_getaffinity(int(task))))
            except ProcessLookupError:
                pass
print([sorted(cores) for cores in others - {frozenset(own)}])
"""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core holds every thread")
    assert run_python(code, str(model)) == "[]"
