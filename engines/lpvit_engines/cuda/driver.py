"""The CUDA driver: the one seam where a CUresult becomes an error in words."""

import ctypes
import logging
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.cuda.bindings import BindingsDriver, find_bindings

LIBRARY = "libcuda.so.1"
# Attribute numbers of CUdevice_attribute and CUfunction_attribute, from cuda.h.
_COMPUTE_CAPABILITY = (75, 76)
_SHARED_PER_BLOCK_OPTIN = 97
_FUNCTION_MAX_DYNAMIC_SHARED = 8
_SHARED_WITHOUT_OPTIN = 48 * 1024

_PROTOTYPES = {
    "cuInit": [c_uint],
    "cuDriverGetVersion": [POINTER(c_int)],
    "cuCtxGetDevice": [POINTER(c_int)],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuModuleUnload": [c_void_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
}

# CUresult, from cuda.h: what happened, then what to do.
_RESULTS = {
    1: ("an argument the driver refuses", "report it with the shapes of the layer"),
    2: ("out of device memory", "free memory on the GPU or use a smaller batch"),
    100: ("no CUDA device", "run on a machine with an NVIDIA GPU, or use another engine"),
    200: ("a kernel image it cannot read", "update the NVIDIA driver"),
    201: ("no current CUDA context", "load the engine, or create a tensor on the GPU, first"),
    209: ("no kernel image for this device", "reinstall lpvit-edge"),
    218: ("PTX it cannot compile", "update the NVIDIA driver"),
    221: ("no PTX compiler in the driver", "install the driver's libnvidia-ptxjitcompiler"),
    222: ("PTX newer than the driver", "update the driver to CUDA 12.0 or newer"),
    400: ("a kernel or stream that no longer exists", "open the kernel again"),
    700: ("an access outside the memory of the device", "restart the process; report the layer"),
    701: ("too few registers or too much shared memory for a launch", "report the device's name"),
    719: ("a kernel that failed on the device", "restart the process; its context is lost"),
}
_IMAGE_REFUSED = frozenset({200, 209})
_ENVIRONMENT = frozenset({100, 200, 201, 209, 218, 221, 222})

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of the current context."""

    compute_capability: int  # major * 10 + minor
    shared_limit_bytes: int  # per CTA, after asking for it
    driver_version: int  # 12060 is CUDA 12.6


@lru_cache
def load_driver(library: str = LIBRARY) -> ctypes.CDLL:
    """The driver, initialised: through cuda-bindings where it is installed, else through ctypes.

    Raises EnvironmentUnfitError where there is none.
    """
    found = _through_bindings() if library == LIBRARY else None
    if found is not None:
        return found
    try:
        driver = ctypes.CDLL(library)
    except OSError as error:
        raise EnvironmentUnfitError(
            f"cannot load {library}: {error}. The CUDA kernels need an NVIDIA driver; without one "
            "use the openvino engine"
        ) from error
    for name, arguments in _PROTOTYPES.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    check(driver.cuInit(0), call="cuInit")
    return driver


def _through_bindings() -> ctypes.CDLL | None:
    """cuda-bindings' driver in the shape of a CDLL; None where it is absent or finds no driver."""
    module = find_bindings()
    if module is None:
        return None
    driver = cast(ctypes.CDLL, BindingsDriver(module))
    try:
        code = driver.cuInit(0)
    except RuntimeError as error:  # no libcuda, in words of its own; ctypes will have ours
        log.debug("cuda-bindings: %s", error)
        return None
    check(code, call="cuInit")
    return driver


def check(code: int, *, call: str) -> None:
    """Raise for a CUresult other than 0: EnvironmentUnfitError where the machine is to blame, else
    EngineError."""
    if code == 0:
        return
    what, remedy = _RESULTS.get(code, ("an unexpected error", "look the CUresult up in cuda.h"))
    message = f"{call} answered CUresult {code}: {what}. To do: {remedy}"
    raise (EnvironmentUnfitError if code in _ENVIRONMENT else EngineError)(message)


def current_device(driver: ctypes.CDLL) -> Device:
    """What the launcher must know of the device of the current context."""
    ordinal, version = c_int(), c_int()
    check(driver.cuCtxGetDevice(byref(ordinal)), call="cuCtxGetDevice")
    check(driver.cuDriverGetVersion(byref(version)), call="cuDriverGetVersion")
    major, minor = (_attribute(driver, ordinal, number) for number in _COMPUTE_CAPABILITY)
    return Device(
        compute_capability=major * 10 + minor,
        shared_limit_bytes=_attribute(driver, ordinal, _SHARED_PER_BLOCK_OPTIN),
        driver_version=version.value,
    )


def _attribute(driver: ctypes.CDLL, ordinal: c_int, number: int) -> int:
    value = c_int()
    check(driver.cuDeviceGetAttribute(byref(value), number, ordinal), call="cuDeviceGetAttribute")
    return value.value


def load_module(driver: ctypes.CDLL, image: bytes) -> c_void_p:
    """Load a cubin or PTX into the current context."""
    module = c_void_p()
    # PTX is text and must end in a zero; ctypes keeps one behind every bytes object.
    check(driver.cuModuleLoadData(byref(module), image), call="cuModuleLoadData")
    return module


def try_load_module(driver: ctypes.CDLL, image: bytes) -> c_void_p | None:
    """Load a cubin; None where the driver is older than the tools that made it."""
    module = c_void_p()
    code = driver.cuModuleLoadData(byref(module), image)
    if code in _IMAGE_REFUSED:
        return None
    check(code, call="cuModuleLoadData")
    return module


def get_function(
    driver: ctypes.CDLL, module: c_void_p, *, entry: str, shared_bytes: int
) -> c_void_p:
    """The kernel of a module, allowed as much dynamic shared memory as it needs."""
    function = c_void_p()
    code = driver.cuModuleGetFunction(byref(function), module, entry.encode())
    check(code, call="cuModuleGetFunction")
    if shared_bytes > _SHARED_WITHOUT_OPTIN:
        code = driver.cuFuncSetAttribute(function, _FUNCTION_MAX_DYNAMIC_SHARED, shared_bytes)
        check(code, call="cuFuncSetAttribute")
    return function


def unload_module(driver: ctypes.CDLL, module: c_void_p) -> None:
    """Unload a module; a context that is already gone took it along, which is no error."""
    code = driver.cuModuleUnload(module)
    if code:
        log.debug("cuModuleUnload answered CUresult %d", code)
