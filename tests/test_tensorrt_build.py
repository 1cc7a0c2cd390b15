"""A build by what TensorRT answers to it: interrupted, refused, short of memory, and judged."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpvit_edge.errors import EngineError
from lpvit_edge.tensorrt_build import build_proven
from lpvit_engines.tensorrt import config as settings
from lpvit_engines.tensorrt import device as gpu
from lpvit_engines.tensorrt import making, plan_file
from lpvit_engines.tensorrt.making import build_plan
from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy
from lpvit_engines.tensorrt.plan_file import Compared
from tests.test_tensorrt_int8 import calibrated, two_four_layer


@pytest.fixture
def trt(trt_that_builds: Any) -> Any:
    return trt_that_builds


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An ONNX file of one 2:4 layer, in a folder of its own."""
    (tmp_path / "here").mkdir()
    return calibrated(tmp_path / "here", two_four_layer())


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def accepted(_: Any) -> Compared:
    return Compared(reference="torch", inputs=1, error=0.0, tolerance=0.01)


def says(trt: Any, *lines: tuple[str, str], serialized: bytes | None = None) -> None:
    """Let the builder log lines (severity, text); it builds nothing, or as it did."""
    build = trt.Builder.build_serialized_network

    def saying(self: Any, network: Any, config: Any) -> bytes | None:
        for severity, text in lines:
            self.logger.log(SimpleNamespace(name=severity), text)
        return None if serialized is None else build(self, network, config)

    trt.Builder.build_serialized_network = saying


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as at a terminal; a shell ignores it for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("thread", ["main", "its own"])
def test_ctrl_c_ends_a_build_in_words_and_changes_nothing(
    trt: Any, model: Path, capsys: pytest.CaptureFixture[str], thread: str
) -> None:
    before = files_of(model.parent)
    went_on: list[bool] = []

    def interrupted(self: Any, network: Any, config: Any) -> bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("tactics", None, 3)
        went_on.append(monitor.step_complete("tactics", 0))
        os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 10.0  # another thread may be the one that is told
        while monitor.step_complete("tactics", 1) and time.monotonic() < deadline:
            time.sleep(0.001)
        went_on.append(monitor.step_complete("tactics", 2))
        return b"unfinished" if went_on[-1] else None

    def in_a_thread(self: Any, network: Any, config: Any) -> bytes | None:
        found: list[bytes | None] = []
        worker = threading.Thread(target=lambda: found.append(interrupted(self, network, config)))
        worker.start()
        worker.join()
        return found[0]

    trt.Builder.build_serialized_network = interrupted if thread == "main" else in_a_thread
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_proven(model, judge=accepted)
    assert went_on == [True, False]
    assert signal.getsignal(signal.SIGINT) is handler
    assert files_of(model.parent) == before
    assert "stopped: no plan of model.onnx was written" in capsys.readouterr().err


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("refused", [False, True])
def test_ctrl_c_while_tensorrt_reads_the_model_is_not_lost(
    trt: Any, model: Path, refused: bool
) -> None:
    """Its logger is called there, and the bindings swallow what that would raise."""
    before, parse = files_of(model.parent), trt.OnnxParser.parse
    went_on: list[bool] = []

    def interrupted(self: Any, content: bytes) -> bool:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
            self.logger.log(SimpleNamespace(name="INFO"), "reading")
        return not refused and bool(parse(self, content))

    def stopped(self: Any, network: Any, config: Any) -> None:
        went_on.append(config.progress_monitor.step_complete("tactics", 0))

    trt.OnnxParser.parse = interrupted
    trt.Builder.build_serialized_network = stopped
    with pytest.raises(KeyboardInterrupt):
        build_proven(model, judge=accepted)
    assert went_on == ([] if refused else [False])
    assert files_of(model.parent) == before


def refuse_network(trt: Any) -> None:
    says(trt, ("ERROR", "no kernel of GEMM found"))


def refuse_config(trt: Any) -> None:
    trt.Builder.create_builder_config = lambda self: None


def refuse_parser(trt: Any) -> None:
    def null(*_: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.OnnxParser = null


def refuse_model(trt: Any) -> None:
    def parse(self: Any, content: bytes) -> bool:
        self.num_errors = 1
        self.get_error = lambda index: SimpleNamespace(
            node=lambda: 7,
            node_name=lambda: "fc1/MatMul",
            node_operator=lambda: "MatMul",
            desc=lambda: "no such operator",
        )
        return False

    trt.OnnxParser.parse = parse
    trt.__version__ = "10.16.2"


def refuse_inspector(trt: Any) -> None:
    runtime = trt.Runtime(None)

    def without(plan: bytes) -> Any:
        engine = runtime.deserialize_cuda_engine(plan)
        engine.create_engine_inspector = lambda: None
        return engine

    trt.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=without)


def refuse_timings(trt: Any) -> None:
    real = trt.Builder.create_builder_config

    def without(self: Any) -> Any:
        config = real(self)
        config.create_timing_cache = lambda content: None
        return config

    trt.Builder.create_builder_config = without


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (
            refuse_network,
            r"built no engine\. TensorRT said: no kernel of GEMM found\. To do: close",
        ),
        (refuse_config, "could not make its builder config"),
        (refuse_parser, "could not make its parser. TensorRT said: pybind11::init.*nullptr"),
        (refuse_model, r"refused the model.*node 7 fc1/MatMul \(MatMul\): no such operator"),
        (refuse_inspector, "could not make its inspector"),
        (refuse_timings, "refused the timing cache .* delete that file"),
    ],
)
def test_what_tensorrt_does_not_make_is_an_error_in_its_words(
    trt: Any, model: Path, refuse: Callable[[Any], None], words: str
) -> None:
    refuse(trt)
    before = files_of(model.parent)
    with pytest.raises(EngineError, match=words):
        build_proven(model, judge=accepted)
    assert files_of(model.parent) == before


def test_timings_that_cannot_be_joined_are_said_and_the_plan_stays(
    trt: Any, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tests.trt.fake_builder.Cache.combine", lambda *_, **__: False)
    build_proven(model, judge=accepted)
    assert "could not join the timings of" in caplog.text  # of the first trial, in the second
    assert list(model.parent.glob("*.plan"))
    caplog.clear()
    monkeypatch.setattr("tests.trt.fake_builder.Cache.serialize", lambda _: None)
    plan_file.discard(model)
    build_proven(model, judge=accepted)
    assert "gave no timings after the build" in caplog.text
    assert list(model.parent.glob("*.plan"))


def test_a_disk_that_takes_no_timings_loses_no_plan(
    trt: Any, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full one, or a home that a service may not write to."""
    home = model.parent / "home"
    home.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    build_proven(model, judge=accepted)
    assert "without the timings of earlier builds" in caplog.text
    assert "timings of this build are not kept: [Errno 20] Not a directory" in caplog.text
    assert list(model.parent.glob("*.plan"))


def test_the_clocks_of_a_build_are_in_its_key_and_its_manifest(
    trt: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "gpu_clocks", lambda: "306-918 MHz")
    monkeypatch.setattr(making, "gpu_clocks", lambda: "306-918 MHz")
    assert build_proven(model, judge=accepted).gpu_clocks == "306-918 MHz"
    (cache,) = Path(os.environ["XDG_CACHE_HOME"], "lpvit-edge").glob("*.cache")
    assert cache.name.endswith("-306-918-mhz.cache")


@pytest.mark.parametrize(("version", "refused", "made"), [("10.3.0", True, 3), ("10.3.0", False, 0),
                                                          ("10.16.2", False, 0)])  # fmt: skip
def test_a_weakly_typed_copy_is_made_where_it_is_built_and_nowhere_else(
    trt: Any,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    refused: bool,
    made: int,
) -> None:
    weak: list[Any] = []

    def copying(portable: Any, **given: Any) -> Any:
        copy = tensorrt_copy(portable, **given)
        if given.get("half") is False:
            weak.append(copy)
        return copy

    parse = trt.OnnxParser.parse
    trt.__version__ = version
    trt.BuilderFlag.FP16 = "FP16"
    trt.Builder.create_network = lambda self, flags: SimpleNamespace(content=b"", flags=flags)
    trt.OnnxParser.parse = lambda self, content: (
        not (refused and self.network.flags) and parse(self, content)
    )
    monkeypatch.setattr(making, "tensorrt_copy", copying)
    with gpu.opened() as device, device.calls.current(device.context):
        manifest = build_plan(model, device, proven=True).manifest
    assert len(weak) == made  # the layer, its twin, the whole
    assert manifest.strongly_typed is not refused


def test_kernels_that_a_trial_passed_over_are_counted_with_the_layer(
    trt: Any, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = "UNSUPPORTED_STATE: Skipping tactic 28 due to insufficient memory on requested size"
    says(trt, ("WARNING", skipped), serialized=b"")
    manifest = build_proven(model, judge=accepted)
    assert manifest.proofs is not None
    assert [proof.memory_skips for proof in manifest.proofs] == [2]  # the layer and its twin
    said = " ".join(capsys.readouterr().err.split())
    assert "1 kernels were passed over for want of memory, and 2 in the trials" in said


def test_how_far_the_trials_are_is_a_phase_of_its_own(trt: Any, model: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    with gpu.opened() as device, device.calls.current(device.context):
        build_plan(model, device, proven=True, on_step=lambda *step: steps.append(step))
    trials = [step[1:] for step in steps if step[0] == "layers against their dense twins"]
    assert trials == [(0, 1), (1, 1)]
