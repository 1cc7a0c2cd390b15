"""Load the kernel of a layer for the device at hand, and launch it."""

import ctypes
import logging
import struct
import threading
from ctypes import c_void_p
from pathlib import Path
from types import TracebackType

from lpvit_edge.errors import EngineError, EnvironmentUnfitError, LpvitEdgeError
from lpvit_engines.cuda import driver as cuda
from lpvit_engines.cuda.driver import Device
from lpvit_engines.cuda.manifest import BINARIES, KernelManifest, Variant, read_image, read_manifest

_OLDEST = 80  # the PTX is for compute capability 8.0 and up
_INT32_MAX = 2**31 - 1
_GRID_ROWS_MAX = 65_535  # CUDA's limit for the second axis of a grid
_ALIGNED = ("x", "values", "rows", "columns", "bias", "residual", "y", "ldx", "ldy")
_CODES = {"pointer": "Q", "int32": "i"}

log = logging.getLogger(__name__)


class Kernel:
    """A loaded kernel, opened by open_kernel; leaving the context unloads it.

    target is the binary in use, such as "sm_87" or "ptx"; note says why it is PTX, and is None for
    an exact cubin.
    """

    def __init__(
        self,
        driver: ctypes.CDLL,
        module: c_void_p,
        *,
        manifest: KernelManifest,
        variant: Variant,
        target: str,
        note: str | None,
    ) -> None:
        image = variant.images[target]
        self.variant, self.target, self.note = variant, target, note
        self._driver, self._module = driver, module
        self._function = cuda.get_function(
            driver, module, entry=manifest.entry, shared_bytes=image.shared_bytes
        )
        # Built once: packing the arguments anew costs ten times as much as writing into them.
        self._layout, self._buffer, self._arguments = _argument_array(manifest)
        self._threads, self._shared_bytes = image.warps * 32, image.shared_bytes
        self._tile_rows, self._block_rows = variant.tile_rows, variant.block_rows
        self._adds_residual = variant.epilogue == "residual"
        self._lock = threading.Lock()  # ctypes lets other threads run during the call

    def launch(
        self,
        *,
        x: int,
        values: int,
        rows: int,
        columns: int,
        bias: int,
        residual: int,
        tokens: int,
        ldx: int,
        ldy: int,
        y: int,
        block_row_count: int,
        stream: int,
    ) -> None:
        """Start y = epilogue(x @ W.T + bias) on a CUDA stream and return at once.

        Addresses are device addresses, multiples of 16. x is (tokens, ldx), y and residual are
        (tokens, ldy); values, rows and columns come from packing.pack, and block_row_count is
        len(rows), so that block_row_count * block_rows is ldy. residual is 0 unless the epilogue
        adds one. Raises EngineError.
        """
        if tokens == 0:
            return
        tiles = -(-tokens // self._tile_rows)
        # One expression without a call: this runs at every launch, the words only for a refusal.
        if (
            (x | values | rows | columns | bias | residual | y | ldx | ldy) & 15
            or not 0 <= tokens * max(ldx, ldy) <= _INT32_MAX
            or tiles > _GRID_ROWS_MAX
            or block_row_count * self._block_rows != ldy
            or self._adds_residual != bool(residual)
        ):
            aligned = (x, values, rows, columns, bias, residual, y, ldx, ldy)
            raise EngineError(self._refusal(aligned, tokens, block_row_count))
        with self._lock:
            self._layout.pack_into(
                self._buffer, 0,
                x, values, rows, columns, bias, residual, tokens, ldx, ldy, y, 0, 0,
            )  # fmt: skip
            code = self._driver.cuLaunchKernel(
                self._function,
                block_row_count, tiles, 1,
                self._threads, 1, 1,
                self._shared_bytes, stream, self._arguments, None,
            )  # fmt: skip
        if code:
            cuda.check(code, call="cuLaunchKernel")

    def _refusal(self, aligned: tuple[int, ...], tokens: int, block_row_count: int) -> str:
        """Why a launch was refused; aligned are the numbers of _ALIGNED, in that order."""
        *_, residual, _, ldx, ldy = aligned
        if any(number % 16 for number in aligned):
            return _misaligned(aligned)
        uncounted = beyond_a_launch(tokens, widest=max(ldx, ldy), tile_rows=self._tile_rows)
        if uncounted is not None:
            return uncounted
        if block_row_count * self._block_rows != ldy:
            return (
                f"{block_row_count} block rows of {self._block_rows} do not make the {ldy} outputs "
                "of the layer: pass the tensors of one weight, as packed"
            )
        return (
            f"{self.variant.name} was launched with residual address {residual:#x}; only the "
            "residual epilogue takes one, and it must"
        )

    def close(self) -> None:
        """Unload the kernel; a second call does nothing."""
        if self._module.value is not None:
            cuda.unload_module(self._driver, self._module)
            # A null function makes the driver refuse a later launch; a stale one may crash.
            self._module, self._function = c_void_p(), c_void_p()

    def __enter__(self) -> "Kernel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def beyond_a_launch(tokens: int, *, widest: int, tile_rows: int) -> str | None:
    """Why one launch cannot compute so many tokens of so many features; None where it can."""
    if not 0 <= tokens * widest <= _INT32_MAX:
        return (
            f"{tokens} tokens of {widest} features: the kernels count up to {_INT32_MAX} elements; "
            "use a smaller batch"
        )
    if tokens > _GRID_ROWS_MAX * tile_rows:
        return (
            f"{tokens} tokens: one launch computes up to {_GRID_ROWS_MAX * tile_rows}; use a "
            "smaller batch"
        )
    return None


def open_kernel(
    *,
    block_rows: int,
    block_cols: int,
    dtype: str,
    epilogue: str = "none",
    library: str = cuda.LIBRARY,
    binaries: Path = BINARIES,
) -> Kernel:
    """Load the kernel for a layer into the current CUDA context.

    An exact cubin is taken, else PTX, never the cubin of a neighbouring architecture: CUDA promises
    that compatibility on desktops only, not on Tegra. Raises EngineError for a shape without a
    kernel, EnvironmentUnfitError for a device or driver that can run none.
    """
    manifest = read_manifest(binaries / "manifest.json")
    variant = manifest.find(
        block_rows=block_rows, block_cols=block_cols, dtype=dtype, epilogue=epilogue
    )
    driver = cuda.load_driver(library)
    device = cuda.current_device(driver)
    target, note = choose_target(variant, device=device)
    module = _load(driver, variant, target=target, device=device, binaries=binaries)
    if module is None:
        note = f"CUDA driver {device.driver_version} refused the {target} cubin: using PTX"
        target = "ptx"
        module = _load(driver, variant, target=target, device=device, binaries=binaries)
        assert module is not None  # for PTX a refusal is an error
    if note:
        log.warning("%s: %s", variant.name, note)
    try:
        return Kernel(driver, module, manifest=manifest, variant=variant, target=target, note=note)
    except LpvitEdgeError:
        cuda.unload_module(driver, module)
        raise


def choose_target(variant: Variant, *, device: Device) -> tuple[str, str | None]:
    """The binary for a device, and a note where it is not the device's own.

    Raises EnvironmentUnfitError below compute capability 8.0.
    """
    capability = f"{device.compute_capability // 10}.{device.compute_capability % 10}"
    if device.compute_capability < _OLDEST:
        raise EnvironmentUnfitError(
            f"the GPU has compute capability {capability}; the block-sparse kernels need 8.0 "
            "(Ampere) or newer: use dense engines on it"
        )
    exact = f"sm_{device.compute_capability}"
    if exact in variant.images:
        return exact, None
    known = ", ".join(sorted(name for name in variant.images if name != "ptx"))
    return "ptx", (
        f"no cubin for compute capability {capability} (there are {known}): the driver compiles "
        "the PTX, and no one has measured this device"
    )


def _load(
    driver: ctypes.CDLL, variant: Variant, *, target: str, device: Device, binaries: Path
) -> c_void_p | None:
    """Load one binary; None where the driver is too old for a cubin."""
    shared = variant.images[target].shared_bytes
    if shared > device.shared_limit_bytes:
        raise EnvironmentUnfitError(
            f"{variant.name} for {target} needs {shared} bytes of shared memory per CTA, the "
            f"device offers {device.shared_limit_bytes}: allocate smaller blocks, or export the "
            "layer dense"
        )
    image = read_image(variant, target=target, folder=binaries)
    if target == "ptx":
        return cuda.load_module(driver, image)
    return cuda.try_load_module(driver, image)


def _misaligned(aligned: tuple[int, ...]) -> str:
    found = ", ".join(
        f"{name} = {number:#x}"
        for name, number in zip(_ALIGNED, aligned, strict=True)
        if number % 16
    )
    return (
        f"{found}: addresses and row lengths must be multiples of 16; pass whole, contiguous "
        "tensors"
    )


def _argument_array(
    manifest: KernelManifest,
) -> tuple[struct.Struct, ctypes.Array[ctypes.c_char], ctypes.Array[c_void_p]]:
    """A buffer for the parameters by the C rule of alignment, its layout, and the addresses of
    the parameters in it, which cuLaunchKernel wants."""
    codes = "".join(_CODES[parameter.type] for parameter in manifest.parameters)
    layout = struct.Struct(f"@{codes}")
    buffer = ctypes.create_string_buffer(layout.size)
    offsets = [struct.calcsize(f"@{codes[:i]}0{code}") for i, code in enumerate(codes)]
    start = ctypes.addressof(buffer)
    return layout, buffer, (c_void_p * len(codes))(*(start + offset for offset in offsets))
