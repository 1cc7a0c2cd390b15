"""From a portable ONNX file to a plan with its manifest: prove each sparse layer, then build."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt import plan_file, plugin
from lpvit_engines.tensorrt.attention import count_attention
from lpvit_engines.tensorrt.build import Built, build, deserialized
from lpvit_engines.tensorrt.config import gpu_clocks
from lpvit_engines.tensorrt.device import OpenDevice
from lpvit_engines.tensorrt.forms import form_for
from lpvit_engines.tensorrt.graph import read_model
from lpvit_engines.tensorrt.kept import MadePlan
from lpvit_engines.tensorrt.library import load_tensorrt
from lpvit_engines.tensorrt.log import Log, make_logger
from lpvit_engines.tensorrt.onnx_copy import tensorrt_copy
from lpvit_engines.tensorrt.plan_file import DeviceKey, PlanManifest
from lpvit_engines.tensorrt.progress import OnStep
from lpvit_engines.tensorrt.ranges import read_ranges
from lpvit_engines.tensorrt.session import Session
from lpvit_engines.tensorrt.sparse_layers import sparse_layers
from lpvit_engines.tensorrt.sparsity import LayerProof, confirm, runs_dense
from lpvit_engines.tensorrt.trials import prove

_LOG = logging.getLogger(__name__)


def make_plan(
    onnx_path: Path,
    device: OpenDevice,
    *,
    proven: bool,
    precision: str = plan_file.DEFAULT_PRECISION,
    python_free: bool = False,
    on_step: OnStep | None = None,
    cache: Path | None = None,
) -> PlanManifest:
    """Build the plan of an ONNX file and write both files beside it.

    An old plan is replaced only once the new one is whole.
    """
    made = build_plan(
        onnx_path,
        device,
        proven=proven,
        precision=precision,
        python_free=python_free,
        on_step=on_step,
        cache=cache,
    )
    plan_file.write(onnx_path, made.plan, made.manifest)
    return made.manifest


def build_plan(
    onnx_path: Path,
    device: OpenDevice,
    *,
    proven: bool,
    precision: str = plan_file.DEFAULT_PRECISION,
    python_free: bool = False,
    on_step: OnStep | None = None,
    cache: Path | None = None,
) -> MadePlan:
    """Build the plan of an ONNX file, and write nothing.

    int8 needs the ranges beside the file (ranges.py); block-sparse layers stay float16 in it. With
    `python_free` the plan loads without this package, on TensorRT 10.9 and newer.

    With `proven` every sparse layer is first timed against its dense twin, and one that does not
    win, alone or in the whole network, is built dense; without, TensorRT decides alone and the
    manifest says that nothing was compared.
    """
    content, portable = read_model(onnx_path)
    ranges, ranges_sha256 = read_ranges(onnx_path) if precision == "int8" else (None, None)
    largest = None if ranges is None else ranges.largest
    maker = _Builder(device, on_step=on_step, cache=cache, ranges=largest, python_free=python_free)
    patterns = sparse_layers(portable)
    proofs = tuple(maker.proofs(portable, patterns)) if proven else ()
    built, confirmed = _settled(maker.whole, portable, patterns, proofs)
    blocks = [n for n, form in patterns.items() if form != "2:4" and _kept(n, confirmed)]
    whole = {} if largest is None else {
        "precision": "int8",
        "ranges_sha256": ranges_sha256,
        "int8_layers": tuple(name for name in largest if name not in blocks),
        "half_layers": tuple(name for name in largest if name in blocks),
    }  # fmt: skip
    manifest = _manifest(
        content,
        built,
        maker.key,
        device,
        proofs=None if patterns and not proven else confirmed,
        python_free=built.python_free,
        attention=count_attention(portable, built.layers),
    )
    return MadePlan(plan=built.plan, manifest=msgspec.structs.replace(manifest, **whole))


def _kept(layer: str, proofs: tuple[LayerProof, ...]) -> bool:
    """Whether a layer kept its sparse form: nothing spoke against it."""
    return all(proof.kept for proof in proofs if proof.layer == layer)


BuildWhole = Callable[[Any, dict[str, str], frozenset[str]], Built]  # portable, patterns, dense


def _settled(
    build_whole: BuildWhole,
    portable: Any,
    patterns: dict[str, str],
    proofs: tuple[LayerProof, ...],
) -> tuple[Built, tuple[LayerProof, ...]]:
    """Build, and again without the layers that won alone but run dense in the whole network."""
    while True:
        losers = frozenset(proof.layer for proof in proofs if not proof.kept)
        built = build_whole(portable, patterns, losers)
        confirmed = confirm(proofs, built.layers, built.sparsity)
        dense = runs_dense(confirmed, built.layers) - losers
        if not dense:
            return built, confirmed
        names = ", ".join(sorted(dense))
        _LOG.warning("built once more, since they run dense in the whole network: %s", names)
        proofs = tuple(c if c.layer in dense else p for c, p in zip(confirmed, proofs, strict=True))


def _manifest(
    content: bytes, built: Built, key: DeviceKey, device: OpenDevice, **given: Any
) -> PlanManifest:
    return PlanManifest(
        kind=plan_file.KIND,
        format=plan_file.FORMAT,
        onnx_sha256=plan_file.sha256(content),
        plan_sha256=plan_file.sha256(built.plan),
        device=key,
        cuda_driver=device.calls.driver_version(),
        precision=plan_file.DEFAULT_PRECISION,
        strongly_typed=built.strongly_typed,
        sparsity=built.sparsity,
        memory_skips=built.memory_skips,
        layers=built.layers,
        gpu_clocks=gpu_clocks(),
        **given,
    )


class _Builder:
    """Builds on one device with the same settings each time."""

    def __init__(
        self,
        device: OpenDevice,
        *,
        on_step: OnStep | None,
        cache: Path | None,
        ranges: Mapping[str, float] | None,
        python_free: bool,
    ) -> None:
        self._device, self._on_step, self._cache = device, on_step, cache
        self._ranges, self._python_free = ranges, python_free
        version = str(load_tensorrt().__version__)
        self.key = plan_file.device_key(device.calls, device.device, tensorrt=version)

    def build(self, portable: Any, dense: Collection[str], sparse_weights: bool) -> Built:
        """A network in the precision of this build, the layers in `dense` without sparse form."""
        key = self.key
        copy = tensorrt_copy(portable, dense=dense, ranges=self._ranges)

        def weak() -> bytes:
            return bytes(tensorrt_copy(portable, dense=dense, half=False).SerializeToString())

        form, content = form_for(copy, python_free=self._python_free), copy.SerializeToString()
        del copy  # memory is what a build on a Jetson lacks
        return build(
            content,
            sparse_weights=sparse_weights,
            free_bytes=self._device.calls.free_bytes(),
            device=f"{key.gpu}-{key.compute_capability}-{key.multiprocessors}",
            weak=weak if self._ranges is None else None,  # int8 has no weakly typed form here
            on_step=self._on_step,
            cache=self._cache,
            form=form,
        )

    def whole(self, portable: Any, patterns: dict[str, str], dense: frozenset[str]) -> Built:
        """The whole network, with SPARSE_WEIGHTS where a 2:4 layer is left."""
        two_four = any(form == "2:4" and name not in dense for name, form in patterns.items())
        return self.build(portable, dense, two_four)

    def proofs(self, portable: Any, patterns: dict[str, str]) -> Iterator[LayerProof]:
        """Each sparse layer against its dense twin; how far they are is a phase of its own."""
        for done, (layer, pattern) in enumerate(patterns.items()):
            self._tried(done, len(patterns))
            yield prove(portable, layer, pattern, build_one=self.build, open_one=self.open)
        self._tried(len(patterns), len(patterns))

    def _tried(self, done: int, total: int) -> None:
        if self._on_step is not None:
            self._on_step("layers against their dense twins", done, total)

    def open(self, built: Built) -> "LoadedPlan":
        free = built.python_free
        return LoadedPlan(load_tensorrt(), self._device, built.plan, python_free=free)


class LoadedPlan:
    """An engine with its session. TensorRT's objects are let go in the reverse order.

    The plugin is registered for it, which a plan that is `python_free` does not need: it may be
    loaded where the other form is registered.
    """

    def __init__(
        self,
        trt: Any,
        device: OpenDevice,
        plan: bytes,
        *,
        python_free: bool,
        zero_copy: bool = False,
    ) -> None:
        if not python_free:
            plugin.register(trt)
        self.log = Log()
        self.logger = make_logger(trt, self.log)
        self._runtime, engine = deserialized(trt, self.logger, plan, self.log)
        self.engine: Any = engine
        context = self._made_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        inputs = frozenset(
            name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        )
        for name in names:
            _refuse_tensor(trt, name, engine.get_tensor_dtype(name), shapes[name])
        self.context: Any = context
        self.session = Session(
            device.calls, context, shapes=shapes, inputs=inputs, log=self.log, zero_copy=zero_copy
        )

    def _made_context(self) -> Any:
        engine = self.engine
        context = engine.create_execution_context()
        if context is None:
            raise self.log.failure(
                "TensorRT made no execution context", "free memory on the device and load it again"
            )
        return context

    def new_context(self) -> Any:
        """Another execution context on the session's buffers, for a profiler of its own."""
        context = self._made_context()
        for tensor in (*self.session.inputs, *self.session.outputs):
            if not context.set_tensor_address(tensor.name, tensor.device):
                raise self.log.failure(
                    f"TensorRT refused the address of {tensor.name}", "report it"
                )
        return context

    def close(self) -> None:
        """Give back the session, then TensorRT's objects, the context before its engine."""
        self.session.close()
        self.context = self.engine = self._runtime = None

    def __enter__(self) -> Session:
        return self.session

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _refuse_tensor(trt: Any, name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    if dtype != trt.DataType.FLOAT or any(size < 1 for size in shape):
        raise EngineError(
            f"tensor {name} of the engine is {dtype} of shape {shape}; this runtime takes float32 "
            "of fixed shape: build the engine with lpvit build"
        )
