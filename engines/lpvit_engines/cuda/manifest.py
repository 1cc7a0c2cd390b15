"""What the shipped kernel binaries are: the record beside them, and the way to their bytes.

binaries/manifest.json describes every variant; binaries/<target>.zip holds one file per variant,
where a target is "ptx" or an exact architecture such as "sm_87".
"""

import hashlib
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

import msgspec

from lpvit_edge.errors import EngineError, FileFormatError

BINARIES = Path(__file__).parent / "binaries"
FORMAT: Final = 1

DType = Literal["float16", "bfloat16"]
Epilogue = Literal["none", "gelu", "residual"]


class Parameter(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One launch parameter, in the order of the kernel's parameter list."""

    name: str
    type: Literal["pointer", "int32"]


class Image(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One binary of a variant. registers and spill_bytes are the assembler's report; None for PTX,
    which the driver assembles."""

    sha256: str
    size_bytes: int
    shared_bytes: int
    warps: int
    registers: int | None
    spill_bytes: int | None


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kernel: a block shape, a number format and an epilogue, for every target.

    tile_rows is how many rows of X one CTA computes; panel_cols is the width of a panel of packed
    weights (see packing.py).
    """

    block_rows: int
    block_cols: int
    dtype: DType
    epilogue: Epilogue
    tile_rows: int
    panel_cols: int
    images: dict[str, Image]

    @property
    def name(self) -> str:
        return f"{self.block_rows}x{self.block_cols}_{self.dtype}_{self.epilogue}"


class KernelManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was built, from which source, by which tools.

    source_sha256 covers the Triton source and the build's options; assemblers maps a target to the
    version of the ptxas that made its cubins.
    """

    kind: Literal["cuda_kernels"]
    format: Literal[1]
    source_sha256: str
    triton: str
    ptx_isa: str
    assemblers: dict[str, str]
    entry: str
    parameters: tuple[Parameter, ...]
    variants: tuple[Variant, ...]

    def find(
        self, *, block_rows: int, block_cols: int, dtype: str, epilogue: str = "none"
    ) -> Variant:
        """The variant for a layer. Raises EngineError when no kernel was built for it."""
        wanted = (block_rows, block_cols, dtype, epilogue)
        for variant in self.variants:
            if wanted == (variant.block_rows, variant.block_cols, variant.dtype, variant.epilogue):
                return variant
        raise EngineError(
            f"no GPU kernel for blocks of {block_rows}x{block_cols} in {dtype} with epilogue "
            f"{epilogue!r}. There are {self.shapes()}, each in float16 and bfloat16 with none, "
            "gelu or residual: allocate one of these shapes, or export the layer dense"
        )

    def shapes(self) -> str:
        """The block shapes there are, in words."""
        pairs = sorted({(v.block_rows, v.block_cols) for v in self.variants}, reverse=True)
        return ", ".join(f"{rows}x{cols}" for rows, cols in pairs)


@lru_cache(maxsize=1)
def shipped_manifest() -> KernelManifest:
    """The manifest of the binaries in this installation."""
    return read_manifest(BINARIES / "manifest.json")


def read_manifest(path: Path) -> KernelManifest:
    """Read and validate a manifest. Raises FileFormatError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=KernelManifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise FileFormatError(
            f"{path} is not a manifest of GPU kernels: {error}. Reinstall lpvit-edge"
        ) from error


def read_image(variant: Variant, *, target: str, folder: Path = BINARIES) -> bytes:
    """The bytes of a variant's binary for a target, compared with the manifest's hash.

    Raises FileFormatError when the binary is missing or not the one that was built.
    """
    image = variant.images[target]
    archive = folder / f"{target}.zip"
    try:
        with zipfile.ZipFile(archive) as members:
            found = members.read(variant.name)
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise FileFormatError(
            f"cannot read {variant.name} from {archive}: {error}. Reinstall lpvit-edge"
        ) from error
    digest = hashlib.sha256(found).hexdigest()
    if digest != image.sha256:
        raise FileFormatError(
            f"{variant.name} in {archive} has SHA-256 {digest}, the manifest says "
            f"{image.sha256}. Reinstall lpvit-edge"
        )
    return found
