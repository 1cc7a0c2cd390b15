"""The engine for Jetson and NVIDIA GPUs: a plan of TensorRT, built on this device, run on it."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import (
    DeviceMismatchError,
    EngineError,
    FileFormatError,
    LpvitEdgeError,
    MismatchError,
)
from lpvit_engines.base import Engine
from lpvit_engines.cuda import driver as cuda
from lpvit_engines.inputs import check_input
from lpvit_engines.tensorrt import plan_file
from lpvit_engines.tensorrt.arrays import DeviceArray, device_array
from lpvit_engines.tensorrt.device import opened
from lpvit_engines.tensorrt.kept import MadePlan, keeps_kernels, kept_plan
from lpvit_engines.tensorrt.library import load_tensorrt
from lpvit_engines.tensorrt.making import LoadedPlan, build_plan
from lpvit_engines.tensorrt.session import EventTimes
from lpvit_engines.tensorrt.times import GroupTime, group_times, make_profiler

_LOG = logging.getLogger(__name__)
_TRIAL_RUNS = 30
_Self = TypeVar("_Self", bound="TensorRtEngine")


class TensorRtEngine:
    """An ONNX model with one input, as a plan beside it: model.HASH.plan, model.plan.json.

    precision "int8" needs model.int8.json beside the ONNX file, see ranges.py, and has
    model.int8.HASH.plan and model.int8.plan.json.

    A plan that is missing, or was made from another ONNX file, is built here, which takes minutes
    on a Jetson; with `rebuild` also one of another device or TensorRT, which is DeviceMismatchError
    otherwise. With `rebuild` or `accept` each sparse layer of a plan that is built here is first
    timed against its dense twin. `accept` is handed the engine of such a plan, and raises
    MismatchError to refuse it. The old plan stays until the new one is whole and accepted, so that
    engines already loaded from it go on, and a build that fails changes nothing. `threads` has no
    meaning on a GPU and is ignored. One thread at a time may use it.
    """

    name = "tensorrt"

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        precision: str = plan_file.DEFAULT_PRECISION,
        rebuild: bool = False,
        accept: Callable[[Engine], None] | None = None,
        library: str = cuda.LIBRARY,
    ) -> None:
        if not path.is_file():
            raise EngineError(f"no model file {path}. Give the path of an existing .onnx file")
        self.path, self.precision = path, precision
        trt = load_tensorrt()
        with ExitStack() as stack:
            self._device = stack.enter_context(opened(library))
            with self._device.calls.current(self._device.context):
                proven = rebuild or accept is not None
                found = self._kept_plan(rebuild=rebuild)
                if proven and found is not None and found.manifest.proofs is None:
                    found = None  # TensorRT chose alone: that is no plan to put in service
                plan = found or self._new_plan(trt, proven=proven)
                self.manifest = plan.manifest
                self._loaded: LoadedPlan | None = self._load(trt, plan.plan)
            stack.callback(self._release, self._loaded)
            self.input_shape, self.output_shapes = _edges(path, self._loaded)
            self.outputs = tuple(self.output_shapes)
            if found is None:
                self._accepted(accept)
                plan_file.write(path, plan.plan, plan.manifest)
            self._resources = stack.pop_all()

    def _kept_plan(self, *, rebuild: bool) -> MadePlan | None:
        """The plan beside the ONNX file; None where one must be built."""
        try:
            return kept_plan(self.path, self._device, precision=self.precision)
        except (DeviceMismatchError, FileFormatError) as error:
            if not rebuild:
                raise
            _LOG.warning("%s", error)
            return None

    def _new_plan(self, trt: Any, *, proven: bool) -> MadePlan:
        _LOG.warning("building the engine of %s; this takes minutes", self.path)
        return build_plan(
            self.path,
            self._device,
            proven=proven,
            precision=self.precision,
            python_free=keeps_kernels(self.path, precision=self.precision, trt=trt),
        )

    def _accepted(self, accept: Callable[[Engine], None] | None) -> None:
        if accept is None:
            return
        try:
            accept(self)
        except MismatchError as error:
            raise MismatchError(
                f"the engine that was built here from {self.path} is not put in place, and what "
                f"was there before stays as it is: {error}"
            ) from error

    def _load(self, trt: Any, plan: bytes) -> LoadedPlan:
        """With copies, or without where memory is shared and that is the faster of the two."""
        with ExitStack() as stack:
            free = self.manifest.python_free
            copying = LoadedPlan(trt, self._device, plan, python_free=free)
            stack.callback(copying.close)
            try:
                sharing = self._sharing(trt, plan)
            except LpvitEdgeError as error:
                _LOG.warning("memory is not shared, which may be slower: %s", error)
                sharing = None
            best = copying
            if sharing is not None:
                stack.callback(sharing.close)
                best = _faster(copying, sharing)
                (copying if best is sharing else sharing).close()
            stack.pop_all()
        return best

    def _sharing(self, trt: Any, plan: bytes) -> LoadedPlan | None:
        if not self._device.calls.is_integrated(self._device.device):
            return None
        free = self.manifest.python_free
        return LoadedPlan(trt, self._device, plan, python_free=free, zero_copy=True)

    def _release(self, loaded: LoadedPlan) -> None:
        try:
            with self._device.calls.current(self._device.context):
                loaded.close()
        except LpvitEdgeError as error:
            _LOG.warning("the engine closes without its CUDA context: %s", error)
            loaded.close()

    def infer(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's answer for x, float32 of input_shape; see base.Engine.infer."""
        with self._ran(x) as loaded:
            return loaded.session.outputs[0].array().copy()

    def infer_all(self, x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Every output for x, by its name; see base.Engine.infer_all."""
        with self._ran(x) as loaded:
            return {tensor.name: tensor.array().copy() for tensor in loaded.session.outputs}

    @contextmanager
    def _ran(self, x: NDArray[np.float32]) -> Iterator[LoadedPlan]:
        check_input(x, self.input_shape, is_open=self._loaded is not None)
        with self._current() as loaded:
            np.copyto(loaded.session.inputs[0].array(), x)
            loaded.session.run()
            yield loaded

    @contextmanager
    def _current(self) -> Iterator[LoadedPlan]:
        if self._loaded is None:
            raise EngineError("this engine is closed; load it again")
        with self._device.calls.current(self._device.context):
            yield self._loaded

    def infer_into(self, x: Any, outputs: Mapping[str, Any], *, stream: int) -> None:
        """Run on arrays that lie on the GPU, on the caller's stream, without a copy.

        x and each of `outputs` (all of self.output_shapes) offer __cuda_array_interface__ (pycuda,
        CuPy, torch), float32, contiguous, in the device's primary context or in a pool of the
        device; `stream` is a CUstream as a number. Returns at once: wait for the stream before
        reading, and before another call. Raises EngineError for what would need a copy.
        """
        with self._current() as loaded:
            session = loaded.session
            found: dict[str, DeviceArray] = {}
            given = {session.inputs[0].name: x, **outputs}
            for tensor in (*session.inputs, *session.outputs):
                if tensor.name not in given:
                    raise EngineError(f"no array for output {tensor.name}; give one for each")
                found[tensor.name] = device_array(
                    given[tensor.name],
                    name=tensor.name,
                    shape=tensor.shape,
                    device=self._device,
                    writable=tensor.name in outputs,
                )
            producers = {x.stream for x in found.values() if x.stream is not None}
            for producer in producers - {stream}:
                _wait_for_producer(self._device.calls, producer, stream)
            addresses = {name: array.address for name, array in found.items()}
            session.run_in_place(addresses, stream=stream)

    def event_times(
        self, x: NDArray[np.float32], *, runs: int, data_transfers: bool = True
    ) -> tuple[EventTimes, ...]:
        """Times of the parts of `runs` runs on x by the device's own events, with their modes."""
        check_input(x, self.input_shape, is_open=self._loaded is not None)
        with self._current() as loaded:
            np.copyto(loaded.session.inputs[0].array(), x)
            loaded.session.run()
            return tuple(loaded.session.timed(data_transfers=data_transfers) for _ in range(runs))

    def layer_times(self, model_layers: tuple[str, ...], *, runs: int) -> tuple[GroupTime, ...]:
        """Time of each layer of the engine, by TensorRT's profiler, in runs of their own.

        Fused layers are a group with one time. Profiling costs time itself: take shares from here.
        """
        with self._current() as loaded:
            samples: dict[str, list[float]] = {}
            profiler = make_profiler(load_tensorrt(), samples)
            context = loaded.new_context()
            context.profiler = profiler
            for _ in range(runs + 1):
                loaded.session.run_profiled(context)
        return group_times(samples, self.manifest.layers, model_layers)

    def kernels(self) -> dict[str, str]:
        """Kernel by layer of the built engine, as TensorRT's inspector names them."""
        if self._loaded is None:
            raise EngineError("this engine is closed; load it again to ask for its kernels")
        return {layer.name: layer.kernel for layer in self.manifest.layers}

    def close(self) -> None:
        """Free the engine, its buffers and the context."""
        if self._loaded is not None:
            self._loaded = None
            self._resources.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _edges(path: Path, loaded: LoadedPlan) -> tuple[tuple[int, ...], dict[str, tuple[int, ...]]]:
    """Shape of the one input, and of each output. Raises EngineError for another network."""
    session = loaded.session
    if len(session.inputs) != 1 or not session.outputs:
        raise EngineError(
            f"{path} has {len(session.inputs)} inputs and {len(session.outputs)} outputs; this "
            "engine takes models with one input, whose first output is the answer"
        )
    return session.inputs[0].shape, {x.name: x.shape for x in session.outputs}


def _wait_for_producer(calls: Any, producer: int, stream: int) -> None:
    """Let the caller's stream begin after the stream that makes an array."""
    event = calls.create_event(spin=True)
    try:
        calls.record(event, producer)
        calls.wait_for_event(stream, event)
    finally:
        calls.destroy_event(event)  # CUDA keeps it until the wait is over


def _faster(copying: LoadedPlan, sharing: LoadedPlan) -> LoadedPlan:
    """The one with the smaller median of whole runs, in turns."""
    samples: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(_TRIAL_RUNS):
        for shares, loaded in ((False, copying), (True, sharing)):
            times = loaded.session.timed()
            parts = (times.to_device_ms, times.compute_ms, times.to_host_ms)
            samples[shares].append(sum(part for part in parts if part is not None))
    return sharing if median(samples[True]) < median(samples[False]) else copying
