"""One layer through the PTX interpreter, with parameters packed by hand from the CUDA ABI."""

import struct

import numpy as np

from lpvit_engines.cuda.half import Bits
from lpvit_engines.cuda.manifest import Image, read_image, shipped_manifest
from tests.cuda.layers import Case, Layer
from tests.cuda.ptx.launch import launch
from tests.cuda.ptx.memory import DeviceMemory

GUARD_ROWS = 2
GUARD = 0x7E01  # a NaN that no kernel writes


def shipped_ptx(case: Case) -> tuple[str, Image]:
    """The text of the PTX that ships for a case, and how to launch it."""
    variant = shipped_manifest().find(
        block_rows=case.block_rows,
        block_cols=case.block_cols,
        dtype=case.dtype,
        epilogue=case.epilogue,
    )
    return read_image(variant, target="ptx").decode(), variant.images["ptx"]


class Arguments:
    """A layer in the interpreter's memory, with guard rows behind the result."""

    def __init__(self, case: Case, layer: Layer, *, shift_bytes: int = 0) -> None:
        self.case = case
        self.memory = DeviceMemory()
        self.out_features = layer.packed.out_features
        self.x = self.memory.put(layer.x, shift_bytes=shift_bytes)
        self.values = self.memory.put(layer.packed.values)
        self.rows = self.memory.put(layer.packed.rows)
        self.columns = self.memory.put(layer.packed.columns)
        self.bias = self.memory.put(layer.bias)
        self.residual = self.memory.put(layer.residual) if case.epilogue == "residual" else 0
        guarded = np.full((case.tokens + GUARD_ROWS, self.out_features), GUARD, np.uint16)
        self.y = self.memory.put(guarded)

    def packed(self, *, tokens: int | None = None, ldx: int | None = None) -> bytes:
        """Six addresses, three int32, padding, the result's address, two null scratch pointers."""
        inputs = (self.x, self.values, self.rows, self.columns, self.bias, self.residual)
        numbers = (tokens or self.case.tokens, ldx or self.case.in_features, self.out_features)
        return struct.pack("<6Q3i4x3Q", *inputs, *numbers, self.y, 0, 0)

    @property
    def grid(self) -> tuple[int, int]:
        return self.case.block_row_count, -(-self.case.tokens // 64)

    def result(self) -> Bits:
        """The result (tokens, out_features), after checking that the guard rows are untouched."""
        shape = (self.case.tokens + GUARD_ROWS, self.out_features)
        found = self.memory.get(self.y, dtype=np.uint16, count=shape[0] * shape[1]).reshape(shape)
        assert (found[-GUARD_ROWS:] == GUARD).all(), "written past the last token"
        return found[:-GUARD_ROWS]


def run_ptx(case: Case, layer: Layer, *, ptx: str, image: Image) -> Bits:
    """Execute PTX on a layer."""
    arguments = Arguments(case, layer)
    launch(
        ptx,
        grid=arguments.grid,
        threads=image.warps * 32,
        shared_bytes=image.shared_bytes,
        parameters=arguments.packed(),
        memory=arguments.memory,
    )
    return arguments.result()
