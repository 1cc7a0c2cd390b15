"""Print what the shipped machine code looks like, one line per block shape.

    PYTHONPATH=.:engines python -m cuda_src.report [sm_87]

The main loop is the code between a backward branch and its target that holds the most tensor-core
instructions; one turn of it computes one panel (64 tokens x block_rows x 64 columns) per CTA.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lpvit_engines.cuda.manifest import Variant, read_image, shipped_manifest

_LINE = re.compile(r"^(?P<label>\.L_x_\d+):|^\s+/\*[0-9a-f]+\*/\s+(?P<code>[^;]+);", re.MULTILINE)
_TENSOR = ("HMMA", "HGMMA")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Instructions of one turn of the main loop, per thread."""

    instructions: int
    tensor: int
    copies: int


def main_loop(variant: Variant, *, target: str) -> Loop:
    """Find the main loop in a cubin's disassembly."""
    code, labels = disassemble(read_image(variant, target=target))
    loops = []
    for end, opcode in enumerate(code):
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", opcode)
        if branch and labels.get(branch[1], end) < end:
            loops.append(code[labels[branch[1]] : end + 1])
    turn = max(loops, key=lambda found: count(found, *_TENSOR))
    return Loop(instructions=len(turn), tensor=count(turn, *_TENSOR), copies=count(turn, "LDGSTS"))


def count(code: list[str], *opcodes: str) -> int:
    return sum(any(re.search(rf"\b{name}\b", line) for name in opcodes) for line in code)


def disassemble(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and where each label points. The disassembler comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    code: list[str] = []
    labels: dict[str, int] = {}
    for found in _LINE.finditer(done.stdout):
        if found["label"]:
            labels[found["label"]] = len(code)
        else:
            code.append(found["code"].strip())
    return code, labels


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else "sm_87"
    print(f"{target}, float16: registers none/gelu/residual, shared bytes, main loop")
    manifest = shipped_manifest()
    for rows, cols in sorted({(v.block_rows, v.block_cols) for v in manifest.variants})[::-1]:
        variants = [
            manifest.find(block_rows=rows, block_cols=cols, dtype="float16", epilogue=epilogue)
            for epilogue in ("none", "gelu", "residual")
        ]
        images = [variant.images[target] for variant in variants]
        loop = main_loop(variants[0], target=target)
        print(
            f"{rows}x{cols}: {'/'.join(str(image.registers) for image in images)} registers, "
            f"{images[0].shared_bytes} B; {loop.instructions} instructions, {loop.tensor} matrix, "
            f"{loop.copies} copies, {loop.instructions / loop.tensor:.1f} per matrix instruction"
        )


if __name__ == "__main__":
    main()
