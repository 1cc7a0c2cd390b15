"""The driver calls of a run time: context, stream, events, memory, graphs. Each answer is
checked.

Addresses and handles are plain integers. Everything here is for the primary context of a device,
which TensorRT, torch and CuPy share.
"""

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from functools import lru_cache
from typing import Any

from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.driver import check

# Names as the library exports them: a _v2 is what cuda.h's plain name stands for.
_PROTOTYPES: dict[str, list[Any]] = {
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetName": [c_char_p, c_int, c_int],
    "cuDeviceTotalMem_v2": [POINTER(c_size_t), c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxGetCurrent": [POINTER(c_void_p)],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_ulonglong],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphExecDestroy": [c_void_p],
    "cuGraphDestroy": [c_void_p],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventElapsedTime": [POINTER(c_float), c_void_p, c_void_p],
    "cuMemGetInfo_v2": [POINTER(c_size_t), POINTER(c_size_t)],
    "cuMemAlloc_v2": [POINTER(c_ulonglong), c_size_t],
    "cuMemFree_v2": [c_ulonglong],
    "cuMemHostAlloc": [POINTER(c_void_p), c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemHostGetDevicePointer_v2": [POINTER(c_ulonglong), c_void_p, c_uint],
    "cuMemcpyHtoDAsync_v2": [c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_ulonglong, c_size_t, c_void_p],
    "cuPointerGetAttribute": [c_void_p, c_int, c_ulonglong],
}
# From cuda.h.
_MULTIPROCESSORS, _INTEGRATED = 16, 18  # CUdevice_attribute
_POINTER_CONTEXT, _POINTER_ORDINAL = 1, 9  # CUpointer_attribute
_INVALID_VALUE = 1  # CUresult
_STREAM_NON_BLOCKING = 1
_EVENT_BLOCKING_SYNC = 1
_HOST_DEVICEMAP = 2
_CAPTURE_THREAD_LOCAL = 1  # other threads may go on calling CUDA meanwhile

log = logging.getLogger(__name__)


@lru_cache
def load_calls(library: str = cuda.LIBRARY) -> "Calls":
    """The driver with the prototypes of this module. Raises EnvironmentUnfitError without one."""
    driver = cuda.load_driver(library)
    for name, arguments in _PROTOTYPES.items():  # cuda-bindings takes and ignores them
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    return Calls(driver)


class Calls:
    """Driver calls by what they do. None of them remembers anything."""

    def __init__(self, driver: ctypes.CDLL) -> None:
        self.driver = driver

    @property
    def through(self) -> str:
        """What carries the calls: ctypes, or cuda-bindings with its version."""
        return str(getattr(self.driver, "through", "ctypes"))

    def _ask(self, name: str, *arguments: Any) -> None:
        check(getattr(self.driver, name)(*arguments), call=name)

    def _handle(self, name: str, *arguments: Any) -> int:
        """A call whose first parameter receives a pointer."""
        handle = c_void_p()
        self._ask(name, byref(handle), *arguments)
        return handle.value or 0

    def _free(self, name: str, handle: int) -> None:
        """Give something back. A context that is lost took it along, which is no second error."""
        code = getattr(self.driver, name)(handle)
        if code:
            log.debug("%s answered CUresult %d", name, code)

    # device and context

    def device(self, ordinal: int = 0) -> int:
        found = c_int()
        self._ask("cuDeviceGet", byref(found), ordinal)
        return found.value

    def device_name(self, device: int) -> str:
        text = ctypes.create_string_buffer(256)
        self._ask("cuDeviceGetName", text, len(text), device)
        return text.value.decode(errors="replace")

    def total_bytes(self, device: int) -> int:
        size = c_size_t()
        self._ask("cuDeviceTotalMem_v2", byref(size), device)
        return size.value

    def multiprocessors(self, device: int) -> int:
        return self._attribute(_MULTIPROCESSORS, device)

    def is_integrated(self, device: int) -> bool:
        """Whether device and host share one memory, as on a Jetson."""
        return self._attribute(_INTEGRATED, device) == 1

    def compute_capability(self, device: int) -> tuple[int, int]:
        major, minor = (self._attribute(number, device) for number in (75, 76))
        return major, minor

    def _attribute(self, number: int, device: int) -> int:
        value = c_int()
        self._ask("cuDeviceGetAttribute", byref(value), number, device)
        return value.value

    def driver_version(self) -> int:
        version = c_int()
        self._ask("cuDriverGetVersion", byref(version))
        return version.value

    def retain_context(self, device: int) -> int:
        return self._handle("cuDevicePrimaryCtxRetain", device)

    def release_context(self, device: int) -> None:
        self._free("cuDevicePrimaryCtxRelease_v2", device)

    def current_context(self) -> int:
        return self._handle("cuCtxGetCurrent")

    @contextmanager
    def current(self, context: int) -> Iterator[None]:
        """Make a context current on this thread, and afterwards the one that was."""
        self._ask("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            popped = c_void_p()
            code = self.driver.cuCtxPopCurrent_v2(byref(popped))
            if code:
                log.debug("cuCtxPopCurrent_v2 answered CUresult %d", code)

    def enter(self, context: int) -> None:
        """Make a context current on this thread for good."""
        self._ask("cuCtxPushCurrent_v2", context)

    def context_of(self, address: int) -> int | None:
        """The context that memory belongs to: 0 for a pool's, which belongs to none, None for an
        address that CUDA does not know."""
        context = c_void_p()
        code = self.driver.cuPointerGetAttribute(byref(context), _POINTER_CONTEXT, address)
        if code == _INVALID_VALUE:
            return None
        check(code, call="cuPointerGetAttribute")
        return context.value or 0

    def ordinal_of(self, address: int) -> int:
        """The number of the device that memory belongs to."""
        ordinal = c_int()
        self._ask("cuPointerGetAttribute", byref(ordinal), _POINTER_ORDINAL, address)
        return ordinal.value

    # memory

    def free_bytes(self) -> int:
        free, total = c_size_t(), c_size_t()
        self._ask("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        address = c_ulonglong()
        self._ask("cuMemAlloc_v2", byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        self._free("cuMemFree_v2", address)

    def allocate_host(self, size: int) -> int:
        """Pinned memory that the device can address too."""
        handle = c_void_p()
        self._ask("cuMemHostAlloc", byref(handle), size, _HOST_DEVICEMAP)
        return handle.value or 0

    def free_host(self, address: int) -> None:
        self._free("cuMemFreeHost", address)

    def device_address(self, host: int) -> int:
        """Where the device finds pinned memory."""
        address = c_ulonglong()
        self._ask("cuMemHostGetDevicePointer_v2", byref(address), host, 0)
        return address.value

    def to_device(self, target: int, host: int, size: int, stream: int) -> None:
        self._ask("cuMemcpyHtoDAsync_v2", target, host, size, stream)

    def to_host(self, host: int, source: int, size: int, stream: int) -> None:
        self._ask("cuMemcpyDtoHAsync_v2", host, source, size, stream)

    # stream, events, graphs

    def create_stream(self) -> int:
        return self._handle("cuStreamCreate", _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._free("cuStreamDestroy_v2", stream)

    def wait(self, stream: int) -> None:
        self._ask("cuStreamSynchronize", stream)

    def wait_for_event(self, stream: int, event: int) -> None:
        """What follows on the stream begins after the event."""
        self._ask("cuStreamWaitEvent", stream, event, 0)

    def create_event(self, *, spin: bool) -> int:
        """An event with timing; waiting for it burns a core (spin) or yields it."""
        return self._handle("cuEventCreate", 0 if spin else _EVENT_BLOCKING_SYNC)

    def destroy_event(self, event: int) -> None:
        self._free("cuEventDestroy_v2", event)

    def record(self, event: int, stream: int) -> None:
        self._ask("cuEventRecord", event, stream)

    def wait_event(self, event: int) -> None:
        self._ask("cuEventSynchronize", event)

    def elapsed_ms(self, begin: int, end: int) -> float:
        time = c_float()
        self._ask("cuEventElapsedTime", byref(time), begin, end)
        return time.value

    def begin_capture(self, stream: int) -> None:
        self._ask("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """The captured graph; an error when the capture was broken off."""
        graph = c_void_p()
        self._ask("cuStreamEndCapture", stream, byref(graph))
        return graph.value or 0

    def instantiate(self, graph: int) -> int:
        return self._handle("cuGraphInstantiateWithFlags", graph, 0)

    def launch_graph(self, executable: int, stream: int) -> None:
        self._ask("cuGraphLaunch", executable, stream)

    def destroy_graph(self, graph: int) -> None:
        self._free("cuGraphDestroy", graph)

    def destroy_executable(self, executable: int) -> None:
        self._free("cuGraphExecDestroy", executable)
