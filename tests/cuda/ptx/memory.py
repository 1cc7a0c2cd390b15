"""Global and shared memory that refuse what a GPU would let pass."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BASE = 0x7F0000000000
_POISON = 0xFF  # reads as NaN in every number format
_NOBODY, _SEVERAL = -1, -2

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]
Lanes = NDArray[np.bool_]


class MemoryFaultError(Exception):
    """An access that a correct kernel does not make."""


class DeviceMemory:
    """Buffers at multiples of 256 bytes, with at least 256 forbidden bytes between them."""

    def __init__(self) -> None:
        self._bytes = np.full(256, _POISON, np.uint8)
        self._allowed = np.zeros(256, bool)

    def put(self, array: NDArray[Any], *, shift_bytes: int = 0) -> int:
        """Copy an array in, at its address (shifted, for tests of alignment)."""
        content = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        start = len(self._bytes) + shift_bytes
        size = -(-(len(content) + shift_bytes) // 256) * 256 + 256
        self._bytes = np.concatenate([self._bytes, np.full(size, _POISON, np.uint8)])
        self._allowed = np.concatenate([self._allowed, np.zeros(size, bool)])
        self._bytes[start : start + len(content)] = content
        self._allowed[start : start + len(content)] = True
        return BASE + start

    def get(self, address: int, *, dtype: Any, count: int) -> NDArray[Any]:
        """Copy an array out."""
        start = address - BASE
        size = count * np.dtype(dtype).itemsize
        return np.frombuffer(self._bytes[start : start + size].tobytes(), dtype)

    def load(self, addresses: Addresses, *, width: int, active: Lanes) -> Bytes:
        """width bytes per lane, (lanes, width); zeros where a lane is not active."""
        index = self._index(addresses, width=width, active=active)
        return self._bytes[np.where(active[:, None], index, 0)]

    def store(self, addresses: Addresses, content: Bytes, *, active: Lanes) -> None:
        index = self._index(addresses, width=content.shape[1], active=active)
        self._bytes[index[active]] = content[active]

    def _index(self, addresses: Addresses, *, width: int, active: Lanes) -> Addresses:
        if (addresses[active] % width).any():
            raise MemoryFaultError("misaligned access to global memory")
        index: Addresses = (addresses - BASE)[:, None] + np.arange(width)
        touched = index[active]
        outside = (touched < 0) | (touched >= len(self._bytes))
        if outside.any() or not self._allowed[touched].all():
            raise MemoryFaultError("access to global memory outside every buffer")
        return index


class SharedMemory:
    """The shared memory of one CTA, which remembers who touched what since the last barrier."""

    def __init__(self, size: int, *, threads: int) -> None:
        self._bytes = np.full(size, _POISON, np.uint8)
        self._warp = np.arange(threads) // 32
        self._writer = np.full(size, _NOBODY)
        self._reader = np.full(size, _NOBODY)
        self._unfenced = np.zeros(size, bool)
        self._borrowed = np.zeros(size, np.int32)

    def barrier(self) -> None:
        self._writer[:] = _NOBODY
        self._reader[:] = _NOBODY

    def load(self, addresses: Addresses, *, width: int, active: Lanes) -> Bytes:
        index = self._index(addresses, width=width, active=active)
        touched, warps = self._touched(index, active)
        writer = self._writer[touched]
        if ((writer != _NOBODY) & (writer != warps)).any():
            raise MemoryFaultError("read of shared memory before a barrier after its write")
        before = self._reader[touched]
        self._reader[touched] = warps
        mixed = (self._reader[touched] != warps) | ((before != _NOBODY) & (before != warps))
        self._reader[touched[mixed]] = _SEVERAL
        return self._bytes[np.where(active[:, None], index, 0)]

    def store(self, addresses: Addresses, content: Bytes, *, active: Lanes) -> None:
        index = self.reserve(addresses, width=content.shape[1], active=active)
        self.land(index, content, active=active)

    def reserve(self, addresses: Addresses, *, width: int, active: Lanes) -> Addresses:
        """Check a write that may land from now on; returns the bytes it goes to."""
        index = self._index(addresses, width=width, active=active)
        touched, warps = self._touched(index, active)
        reader = self._reader[touched]
        if ((reader != _NOBODY) & (reader != warps)).any():
            raise MemoryFaultError("write to shared memory before a barrier after its read")
        if self._borrowed[touched].any():
            raise MemoryFaultError("write to shared memory that a wgmma may still read")
        return index

    def land(self, index: Addresses, content: Bytes, *, active: Lanes) -> None:
        """Let a reserved write arrive."""
        touched, warps = self._touched(index, active)
        self._bytes[touched] = content[active]
        self._writer[touched] = warps
        self._unfenced[touched] = True

    def fence_for_the_matrix_unit(self) -> None:
        """fence.proxy.async: what threads wrote becomes visible to wgmma."""
        self._unfenced[:] = False

    def lend(self, index: Addresses) -> Bytes:
        """Bytes for wgmma, which reads them for all four warps, at any time until `give_back`."""
        if (index < 0).any() or (index >= len(self._bytes)).any():
            raise MemoryFaultError("access outside the CTA's shared memory")
        if (self._writer[index] != _NOBODY).any():
            raise MemoryFaultError("wgmma of shared memory before a barrier after its write")
        if self._unfenced[index].any():
            raise MemoryFaultError("wgmma of shared memory without a proxy fence after its write")
        self._borrowed[index] += 1
        return self._bytes[index]

    def give_back(self, index: Addresses) -> None:
        self._borrowed[index] -= 1

    def _touched(self, index: Addresses, active: Lanes) -> tuple[Addresses, Addresses]:
        touched = index[active]
        return touched, np.broadcast_to(self._warp[active][:, None], touched.shape)

    def _index(self, addresses: Addresses, *, width: int, active: Lanes) -> Addresses:
        if (addresses[active] % width).any():
            raise MemoryFaultError("misaligned access to shared memory")
        index: Addresses = addresses[:, None] + np.arange(width)
        touched = index[active]
        if (touched < 0).any() or (touched >= len(self._bytes)).any():
            raise MemoryFaultError("access outside the CTA's shared memory")
        return index
