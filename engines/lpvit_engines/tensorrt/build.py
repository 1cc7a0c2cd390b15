"""From the TensorRT copy of a model to a serialized engine."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt import config as settings
from lpvit_engines.tensorrt.forms import Form
from lpvit_engines.tensorrt.inspector import EngineLayer, engine_layers
from lpvit_engines.tensorrt.library import load_tensorrt, version_of
from lpvit_engines.tensorrt.log import Log, make_logger, memory_skips, refuse_overflow
from lpvit_engines.tensorrt.progress import OnStep, interruptible, make_monitor
from lpvit_engines.tensorrt.sparsity import SparsityCount, count

_IDLE = "close other programs on the device and build again"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A serialized engine and what TensorRT said and made while building it."""

    plan: bytes
    layers: tuple[EngineLayer, ...]
    sparsity: SparsityCount
    strongly_typed: bool
    memory_skips: int  # kernels passed over for want of memory
    python_free: bool  # loads without the plugin


class _ParserRefusedError(EngineError):
    """What alone may be tried again weakly typed; memory and overflow are not the parser's."""


def build(
    onnx_bytes: bytes,
    *,
    sparse_weights: bool,
    free_bytes: int,
    device: str,
    weak: Callable[[], bytes] | None = None,
    on_step: OnStep | None = None,
    cache: Path | None = None,
    form: Form | None = None,
) -> Built:
    """Build the engine of a TensorRT copy on the device at hand.

    `free_bytes` is the memory that is free there, `device` names it for the timing cache, `weak`
    makes the copy in float32: on TensorRT 10.3, whose strongly typed parser was young, a copy that
    the parser refuses strongly typed is built from it with the float16 flag instead. `form` is that
    of the copy's block-sparse layers (forms.form_for). Needs a current CUDA context.
    Raises EngineError in TensorRT's own words, KeyboardInterrupt once Ctrl-C has ended the build.
    """
    from lpvit_engines.tensorrt import ahead_of_time, plugin

    trt = load_tensorrt()
    if form == "ptx":
        ahead_of_time.register(trt)
    elif form == "python":
        plugin.register(trt)
    folder = cache or settings.cache_folder()
    path = settings.timing_cache_path(
        folder, version=str(trt.__version__), device=device, clocks=settings.gpu_clocks()
    )
    with interruptible() as is_stopped:
        options = _Options(
            sparse_weights=sparse_weights,
            free_bytes=free_bytes,
            cache=path,
            on_step=on_step,
            is_stopped=is_stopped,
            python_free=form != "python",
        )
        try:
            return _build(trt, onnx_bytes, options, strongly_typed=True)
        except _ParserRefusedError:
            if weak is None or version_of(trt) != (10, 3):
                raise
        return _build(trt, weak(), options, strongly_typed=False)


@dataclass(frozen=True, kw_only=True)
class _Options:
    sparse_weights: bool
    free_bytes: int
    cache: Path
    on_step: OnStep | None
    is_stopped: Callable[[], bool]
    python_free: bool


def _build(trt: Any, onnx_bytes: bytes, options: _Options, *, strongly_typed: bool) -> Built:
    log = Log()
    logger = make_logger(trt, log)
    builder = made("Builder", lambda: trt.Builder(logger), log=log)
    network = parsed(trt, builder, logger, onnx_bytes, log, strongly_typed=strongly_typed)
    config = made("builder config", lambda: builder.create_builder_config(), log=log)
    settings.set_up(
        trt,
        config,
        sparse_weights=options.sparse_weights,
        half_flag=not strongly_typed,
        free_bytes=options.free_bytes,
    )
    settings.attach_timing_cache(config, options.cache, log)
    monitor = make_monitor(trt, options.on_step, options.is_stopped)
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise log.failure("TensorRT built no engine", _IDLE)
    refuse_overflow(log.lines)
    settings.save_timing_cache(config, options.cache, log)
    plan = bytes(serialized)
    return Built(
        plan=plan,
        layers=layers_of(trt, plan),
        sparsity=count(log.lines),
        strongly_typed=strongly_typed,
        memory_skips=memory_skips(log.lines),
        python_free=options.python_free,
    )


def parsed(
    trt: Any, builder: Any, logger: Any, onnx_bytes: bytes, log: Log, *, strongly_typed: bool
) -> Any:
    """The network of an ONNX file. Raises EngineError with every error of the parser."""
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if strongly_typed else 0
    network = made("network", lambda: builder.create_network(flags), log=log)
    parser = made("parser", lambda: trt.OnnxParser(network, logger), log=log)
    if not parser.parse(onnx_bytes):
        problems = [_described(parser.get_error(i)) for i in range(parser.num_errors)]
        for problem in problems:
            log.add("ERROR", problem)
        failure = log.failure(
            "TensorRT's parser refused the model", "export it again with lpvit build, or report it"
        )
        raise _ParserRefusedError(str(failure))
    return network


def _described(problem: Any) -> str:
    return (
        f"node {problem.node()} {problem.node_name()} ({problem.node_operator()}): {problem.desc()}"
    )


def made(what: str, make: Callable[[], Any], *, log: Log) -> Any:
    """What one of TensorRT's classes or calls makes.

    Where CUDA or a library is missing the bindings raise TypeError ("factory function returned
    nullptr") or return None; both become EngineError.
    """
    try:
        found = make()
    except TypeError as error:
        log.add("ERROR", str(error))
        found = None
    if found is None:
        raise log.failure(
            f"TensorRT could not make its {what}",
            "see `lpvit doctor`: driver, CUDA and TensorRT must fit each other",
        )
    return found


def layers_of(trt: Any, plan: bytes) -> tuple[EngineLayer, ...]:
    """What runs in a serialized engine, by TensorRT's inspector."""
    log = Log()
    logger = make_logger(trt, log)
    runtime, engine = deserialized(trt, logger, plan, log)
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise log.failure("TensorRT could not make its inspector", _IDLE)
    found = engine_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    del inspector, engine, runtime  # in this order: an engine must not outlive its runtime
    return found


def deserialized(trt: Any, logger: Any, plan: bytes, log: Log) -> tuple[Any, Any]:
    """(runtime, engine) of a serialized engine; keep both, and the logger, while it is used.

    Its plugin must be registered, unless its kernels lie in it (python_free).
    """
    runtime = made("Runtime", lambda: trt.Runtime(logger), log=log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise log.failure(
            "TensorRT cannot load the engine", "build it again on this device with lpvit build"
        )
    return runtime, engine
