"""An execution context with its buffers, its stream and its captured graph."""

import ctypes
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lpvit_edge.errors import EngineError, LpvitEdgeError
from lpvit_engines.cuda.calls import Calls
from lpvit_engines.tensorrt.log import Log

_LOG = logging.getLogger(__name__)


class TimingModes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a time was taken. trtexec changed the defaults of all three in TensorRT 11, so a number
    without them compares with nothing."""

    cuda_graph: bool
    spin_wait: bool
    data_transfers: bool


class EventTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run by the device's own events. Transfers are None where memory is shared or they were
    left out."""

    to_device_ms: float | None
    compute_ms: float
    to_host_ms: float | None
    modes: TimingModes


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output of the engine, float32, and where it lies."""

    name: str
    shape: tuple[int, ...]
    host: int
    device: int  # the host's own memory as the device sees it, where nothing is copied

    @property
    def size(self) -> int:
        return 4 * int(np.prod(self.shape))

    def array(self) -> NDArray[np.float32]:
        """The pinned memory as an array; writing to it writes the tensor."""
        buffer = (ctypes.c_float * (self.size // 4)).from_address(self.host)
        whole: NDArray[np.float32] = np.ctypeslib.as_array(buffer)
        return whole.reshape(self.shape)


class Session:
    """Runs one engine on one stream. Opened whole or not at all; close() gives everything back.

    `calls` must have the engine's CUDA context current while a method runs. With `zero_copy` the
    device works on pinned host memory, which on a Jetson is the same memory.
    """

    def __init__(
        self,
        calls: Calls,
        context: Any,
        *,
        shapes: dict[str, tuple[int, ...]],
        inputs: frozenset[str],
        log: Log,
        zero_copy: bool = False,
        cuda_graph: bool = True,
        spin_wait: bool = True,
    ) -> None:
        self._calls, self._log = calls, log
        self._context: Any = context
        self.zero_copy, self._spin = zero_copy, spin_wait
        self._executable: int | None = None
        with ExitStack() as stack:
            self._stream = calls.create_stream()
            stack.callback(calls.destroy_stream, self._stream)
            self._events = [self._event(stack) for _ in range(4)]
            tensors = [self._tensor(stack, name, shape) for name, shape in shapes.items()]
            self.inputs = [x for x in tensors if x.name in inputs]
            self.outputs = [x for x in tensors if x.name not in inputs]
            for tensor in tensors:
                self._bind(tensor.name, tensor.device)
            self._enqueue(self._stream)  # TensorRT allocates and loads on its first run
            calls.wait(self._stream)
            if cuda_graph:
                self._executable = self._capture(stack)
            self._resources = stack.pop_all()

    def _event(self, stack: ExitStack) -> int:
        event = self._calls.create_event(spin=self._spin)
        stack.callback(self._calls.destroy_event, event)
        return event

    def _tensor(self, stack: ExitStack, name: str, shape: tuple[int, ...]) -> Tensor:
        size = 4 * int(np.prod(shape))
        host = self._calls.allocate_host(size)
        stack.callback(self._calls.free_host, host)
        if self.zero_copy:
            return Tensor(
                name=name, shape=shape, host=host, device=self._calls.device_address(host)
            )
        device = self._calls.allocate(size)
        stack.callback(self._calls.free, device)
        return Tensor(name=name, shape=shape, host=host, device=device)

    def _bind(self, name: str, address: int) -> None:
        context = self._context
        if not context.set_tensor_address(name, address):
            raise self._log.failure(
                f"TensorRT refused the address of {name}", "build the engine again"
            )

    def _enqueue(self, stream: int) -> None:
        context = self._context
        if not context.execute_async_v3(stream_handle=stream):
            raise self._log.failure(
                "TensorRT could not run the engine",
                "see the plugin's own message above, if there is one, and report it",
            )

    def _capture(self, stack: ExitStack) -> int | None:
        """The whole engine as one graph; None, with a warning, where it cannot be captured."""
        calls = self._calls
        try:
            calls.begin_capture(self._stream)
            try:
                self._enqueue(self._stream)
            except LpvitEdgeError:  # a capture left open would poison the stream
                calls.destroy_graph(calls.end_capture(self._stream))
                raise
            graph = calls.end_capture(self._stream)
            try:
                executable = calls.instantiate(graph)
                stack.callback(calls.destroy_executable, executable)
            finally:
                calls.destroy_graph(graph)
        except LpvitEdgeError as error:
            _LOG.warning("runs without a CUDA graph, more slowly: %s", error)
            return None
        return executable

    @property
    def has_graph(self) -> bool:
        return self._executable is not None

    def run(self) -> None:
        """Compute the outputs from what is in the input arrays, and wait for them."""
        self._to_device()
        self._compute()
        self._to_host()
        self._calls.wait(self._stream)

    def timed(self, *, data_transfers: bool = True) -> EventTimes:
        """Like run(), with the device's times of the parts."""
        calls, copies = self._calls, data_transfers and not self.zero_copy
        start, copied, computed, end = self._events
        calls.record(start, self._stream)
        if copies:
            self._to_device()
        calls.record(copied, self._stream)
        self._compute()
        calls.record(computed, self._stream)
        if copies:
            self._to_host()
        calls.record(end, self._stream)
        calls.wait_event(end)
        return EventTimes(
            to_device_ms=calls.elapsed_ms(start, copied) if copies else None,
            compute_ms=calls.elapsed_ms(copied, computed),
            to_host_ms=calls.elapsed_ms(computed, end) if copies else None,
            modes=TimingModes(
                cuda_graph=self.has_graph, spin_wait=self._spin, data_transfers=copies
            ),
        )

    def run_in_place(self, addresses: dict[str, int], *, stream: int) -> None:
        """Enqueue on the caller's stream with the caller's device memory, and return at once.

        The engine's own addresses are put back afterwards: TensorRT reads them when it enqueues.
        """
        unknown = addresses.keys() ^ {x.name for x in (*self.inputs, *self.outputs)}
        if unknown:
            raise EngineError(
                f"give one array for each tensor; wrong: {', '.join(sorted(unknown))}"
            )
        try:
            for name, address in addresses.items():
                self._bind(name, address)
            self._enqueue(stream)
        finally:
            for tensor in (*self.inputs, *self.outputs):
                self._bind(tensor.name, tensor.device)

    def run_profiled(self, context: Any) -> None:
        """One run of another execution context, to which a profiler is attached: outside the graph,
        which a profiler cannot see into."""
        if not context.execute_async_v3(stream_handle=self._stream):
            raise self._log.failure("TensorRT could not profile the engine", "report it")
        self._calls.wait(self._stream)

    def _to_device(self) -> None:
        if not self.zero_copy:
            for x in self.inputs:
                self._calls.to_device(x.device, x.host, x.size, self._stream)

    def _to_host(self) -> None:
        if not self.zero_copy:
            for x in self.outputs:
                self._calls.to_host(x.host, x.device, x.size, self._stream)

    def _compute(self) -> None:
        if self._executable is None:
            self._enqueue(self._stream)
        else:
            self._calls.launch_graph(self._executable, self._stream)

    def close(self) -> None:
        """Give everything back, newest first; a second call does nothing."""
        self._resources.close()
        self._executable = self._context = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
