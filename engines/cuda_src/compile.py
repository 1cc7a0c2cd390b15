"""From the Triton source to PTX, and from PTX to cubins; together with the source it decides every
shipped byte, so both files are hashed into the manifest.

One PTX (sm_80, ISA 8.0) per variant is shipped as it is and assembled for sm_80, 86, 87, 89 and
110: what the PTX interpreter of the tests executes is what these cubins were made from. sm_90 has
a PTX of its own, which uses Hopper's wgmma; its cubin alone ships.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distribution
from itertools import product
from pathlib import Path
from typing import Any

TRITON = "3.7.1"
PTX_ISA = "8.0"  # CUDA 12.0: JetPack 6's driver (12.6) refuses Triton's default of 8.7
SHAPES = ((64, 64), (64, 32), (64, 16), (64, 8), (32, 32), (16, 16))
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
EPILOGUES = ("none", "gelu", "residual")
TILE_ROWS = 64
PANEL_COLS = 64
WARPS = 4
# The column table is an indirect load, on which Triton spends stages: 3 or 4 leave a single buffer
# for X and W, 5 gives two.
STAGES = 5
# Promises to the compiler, kept by packing.py and kernel.py: 16-byte copies need them.
MULTIPLES_OF_16 = ("x", "values", "rows", "columns", "bias", "residual", "y", "ldx", "ldy")


@dataclass(frozen=True, kw_only=True)
class Assembler:
    """A ptxas that comes as a Python package. CUDA promises Tegra no compatibility between minor
    versions, so each Jetson's cubins come from the CUDA of its first JetPack."""

    package: str
    version: str
    path: str


CUDA_12 = Assembler(  # JetPack 6
    package="nvidia-cuda-nvcc-cu12", version="12.6.85", path="nvidia/cuda_nvcc/bin/ptxas"
)
CUDA_13 = Assembler(  # JetPack 7.1
    package="nvidia-cuda-nvcc", version="13.0.88", path="nvidia/cu13/bin/ptxas"
)
ASSEMBLERS = {
    "sm_80": CUDA_12,
    "sm_86": CUDA_12,
    "sm_87": CUDA_12,
    "sm_89": CUDA_12,
    "sm_90": CUDA_12,
    "sm_110": CUDA_13,
}
GPU_NAMES = {"sm_90": "sm_90a"}  # wgmma exists on the exact chip alone


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a variant is made of."""

    block_rows: int
    block_cols: int
    dtype: str
    epilogue: str


@dataclass(frozen=True, kw_only=True)
class Ptx:
    """Compiled PTX and how it wants to be launched."""

    text: str
    entry: str
    shared_bytes: int
    warps: int


@dataclass(frozen=True, kw_only=True)
class Cubin:
    """An assembled kernel and what the assembler reported of it."""

    content: bytes
    registers: int
    spill_bytes: int


def recipes() -> Iterator[Recipe]:
    for (rows, cols), dtype, epilogue in product(SHAPES, DTYPES, EPILOGUES):
        yield Recipe(block_rows=rows, block_cols=cols, dtype=dtype, epilogue=epilogue)


def compile_ptx(recipe: Recipe, *, architecture: int = 80) -> Ptx:
    """Compile a variant for an architecture; needs no GPU and no driver."""
    import triton
    from triton.backends.compiler import GPUTarget

    with reproducible_triton():
        kernel = triton.compile(
            source_of(recipe),
            target=GPUTarget("cuda", architecture, 32),
            options={
                "num_warps": WARPS,
                "num_stages": STAGES,
                "ptx_version": int(PTX_ISA.replace(".", "")),
            },
        )
    found = kernel.metadata
    scratch = (found.global_scratch_size, found.profile_scratch_size)
    if scratch != (0, 0) or found.num_ctas != 1:
        raise RuntimeError(
            f"{recipe}: scratch memory {scratch}, {found.num_ctas} CTAs a cluster; the launcher "
            "passes null scratch and launches no clusters"
        )
    return Ptx(
        text=kernel.asm["ptx"],
        entry=found.name,
        shared_bytes=found.shared,
        warps=found.num_warps,
    )


def source_of(recipe: Recipe) -> Any:
    from triton.compiler import ASTSource

    from cuda_src.block_sparse_linear import block_sparse_linear as kernel

    half = f"*{DTYPES[recipe.dtype]}"
    constants = {
        "BM": TILE_ROWS,
        "BN": recipe.block_rows,
        "BK": recipe.block_cols,
        "KT": PANEL_COLS,
        "EPILOGUE": recipe.epilogue,
        "UPCAST": False,
    }
    signature = {name: half for name in ("x", "values", "bias", "residual", "y")}
    signature |= {"rows": "*i32", "columns": "*i32", "M": "i32", "ldx": "i32", "ldy": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(kernel.arg_names)
    return ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in MULTIPLES_OF_16},
    )


@contextmanager
def reproducible_triton() -> Iterator[None]:
    """No cached results, and no line table: it holds this machine's paths and is 4/5 of a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = cache
        knobs.compilation.disable_line_info = True
        yield


def assemble(ptx: Ptx, *, target: str) -> Cubin:
    """Assemble PTX for an exact architecture such as "sm_87"."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx.text)
        done = subprocess.run(
            [ptxas(ASSEMBLERS[target]), "-v", f"--gpu-name={GPU_NAMES.get(target, target)}",
             "kernel.ptx", "-o", "kernel.cubin"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"ptxas for {target} failed: {done.stderr}")
        content = output.read_bytes()
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    if not registers or len(spills) != 2:
        raise RuntimeError(f"ptxas for {target} reported no resources: {done.stderr}")
    return Cubin(
        content=content, registers=int(registers[1]), spill_bytes=sum(int(n) for n in spills)
    )


def ptxas(assembler: Assembler) -> Path:
    """The executable of an assembler; another version than the pinned one is refused."""
    found = distribution(assembler.package)
    if found.version != assembler.version:
        raise RuntimeError(
            f"{assembler.package} {found.version} is installed, the kernels are built with "
            f"{assembler.version}: pip install --no-deps {assembler.package}=={assembler.version}"
        )
    return Path(str(found.locate_file(assembler.path)))
