"""Build the kernel binaries that ship in lpvit_engines/cuda/binaries, or compare them.

    PYTHONPATH=.:engines python -m cuda_src.build            rebuild all
    PYTHONPATH=.:engines python -m cuda_src.build --check    rebuild all, write nothing, exit 1
                                                             where source and binaries differ

Needs no GPU and no driver:
    pip install triton==3.7.1 && pip install --no-deps \\
        nvidia-cuda-nvcc-cu12==12.6.85 nvidia-cuda-nvcc==13.0.88
"""

import argparse
import hashlib
import io
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import msgspec

from cuda_src import compile as kernels
from lpvit_engines.cuda.manifest import (
    BINARIES,
    FORMAT,
    Image,
    KernelManifest,
    Parameter,
    Variant,
)

ENTRY = "block_sparse_linear"
ASSEMBLED = tuple(kernels.ASSEMBLERS)
# Triton appends two scratch pointers to every kernel; here both are null.
PARAMETERS = (
    *(
        Parameter(name=name, type="pointer")
        for name in ("x", "values", "rows", "columns", "bias", "residual")
    ),
    *(Parameter(name=name, type="int32") for name in ("tokens", "ldx", "ldy")),
    *(Parameter(name=name, type="pointer") for name in ("y", "scratch", "profile_scratch")),
)
SOURCES = ("block_sparse_linear.py", "compile.py")


def main() -> int:
    """Write or compare every file of the binaries folder."""
    parser = argparse.ArgumentParser(
        description="Build the shipped GPU kernels, or compare them with the source."
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    files = build()
    if check:
        different = [name for name, content in files.items() if not same(name, content)]
        print(f"{len(files)} files, differing: {', '.join(different) or 'none'}")
        return 1 if different else 0
    BINARIES.mkdir(exist_ok=True)
    for name, content in files.items():
        (BINARIES / name).write_bytes(content)
    print(f"{len(files)} files, {sum(map(len, files.values()))} bytes, in {BINARIES}")
    return 0


def same(name: str, content: bytes) -> bool:
    path = BINARIES / name
    if not path.exists():
        return False
    if path.suffix == ".zip":  # another zlib may compress the same members differently
        return members(path.read_bytes()) == members(content)
    return path.read_bytes() == content


def build() -> dict[str, bytes]:
    """Every file of the binaries folder, by name."""
    installed = version("triton")
    if installed != kernels.TRITON:
        raise SystemExit(f"triton {installed} is installed: pip install triton=={kernels.TRITON}")
    contents: dict[str, dict[str, bytes]] = {}
    variants = []
    for recipe in kernels.recipes():
        variant, images = build_variant(recipe)
        variants.append(variant)
        for target, content in images.items():
            contents.setdefault(target, {})[variant.name] = content
        print(f"built {variant.name}", file=sys.stderr)
    files = {f"{target}.zip": archive(found) for target, found in contents.items()}
    return {"manifest.json": encode(tuple(variants)), **files}


def build_variant(recipe: kernels.Recipe) -> tuple[Variant, dict[str, bytes]]:
    """One variant for every target: its record and its binaries."""
    return assemble_variant(recipe, ptx_by_target(recipe))


def ptx_by_target(recipe: kernels.Recipe) -> dict[str, kernels.Ptx]:
    """The PTX that ships, and the one that each target's cubin is made from."""
    common = kernels.compile_ptx(recipe)
    hopper = kernels.compile_ptx(recipe, architecture=90)
    return {
        target: hopper if target == "sm_90" else common for target in ("ptx", *kernels.ASSEMBLERS)
    }


def assemble_variant(
    recipe: kernels.Recipe, ptx: dict[str, kernels.Ptx]
) -> tuple[Variant, dict[str, bytes]]:
    """The record and the binaries of compiled PTX; the assemblers run side by side."""
    contents = {"ptx": ptx["ptx"].text.encode()}
    images = {"ptx": image(contents["ptx"], ptx=ptx["ptx"], registers=None, spill_bytes=None)}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # each waits for its process
        cubins = pool.map(lambda target: kernels.assemble(ptx[target], target=target), ASSEMBLED)
        for target, cubin in zip(ASSEMBLED, cubins, strict=True):
            contents[target] = cubin.content
            images[target] = image(
                cubin.content,
                ptx=ptx[target],
                registers=cubin.registers,
                spill_bytes=cubin.spill_bytes,
            )
    return record(recipe, images), contents


def record(recipe: kernels.Recipe, images: dict[str, Image]) -> Variant:
    return msgspec.convert(
        {
            "block_rows": recipe.block_rows,
            "block_cols": recipe.block_cols,
            "dtype": recipe.dtype,
            "epilogue": recipe.epilogue,
            "tile_rows": kernels.TILE_ROWS,
            "panel_cols": kernels.PANEL_COLS,
            "images": images,
        },
        Variant,
    )


def image(
    content: bytes, *, ptx: kernels.Ptx, registers: int | None, spill_bytes: int | None
) -> Image:
    if ptx.entry != ENTRY:
        raise RuntimeError(f"the kernel is called {ptx.entry}, the launcher looks for {ENTRY}")
    return Image(
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        shared_bytes=ptx.shared_bytes,
        warps=ptx.warps,
        registers=registers,
        spill_bytes=spill_bytes,
    )


def encode(variants: tuple[Variant, ...]) -> bytes:
    manifest = KernelManifest(
        kind="cuda_kernels",
        format=FORMAT,
        source_sha256=source_sha256(),
        triton=kernels.TRITON,
        ptx_isa=kernels.PTX_ISA,
        assemblers={target: used.version for target, used in kernels.ASSEMBLERS.items()},
        entry=ENTRY,
        parameters=PARAMETERS,
        variants=variants,
    )
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def source_sha256() -> str:
    """One hash over the files that decide every shipped byte."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()


def archive(found: dict[str, bytes]) -> bytes:
    """A zip without dates, so that the same members give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as members:
        for name in sorted(found):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            members.writestr(entry, found[name], compresslevel=9)
    return buffer.getvalue()


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as found:
        return {name: found.read(name) for name in found.namelist()}


if __name__ == "__main__":
    sys.exit(main())
