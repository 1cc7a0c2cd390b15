"""The architecture, as tests: who may import whom, and what an import may cost."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "accelerate", "asyncua", "av", "cv2", "gpiod", "httpx", "jinja2", "onnx", "onnxruntime",
    "onnxscript", "openvino", "paho", "PIL", "pymodbus", "pynvml", "safetensors", "scipy",
    "tensorrt", "timm", "torch", "torchvision", "triton",
}  # fmt: skip
# These modules do nothing without torch; whoever needs one imports it inside a function.
TORCH_MODULES = {
    "lpvit_edge.distill",
    "lpvit_edge.evaluate",
    "lpvit_edge.export",
    "lpvit_edge.layers",
    "lpvit_edge.match_outputs",
    "lpvit_edge.models",
    "lpvit_edge.partial",
    "lpvit_edge.permute",
    "lpvit_edge.prune",
    "lpvit_edge.prune_refusals",
    "lpvit_edge.repair",
    "lpvit_edge.rotate",
    "lpvit_edge.sensitivity",
    "lpvit_edge.shrink",
    "lpvit_edge.solve",
    "lpvit_edge.spread",
    "lpvit_edge.statistics",
    "lpvit_edge.streams",
    "lpvit_edge.trial",
    "lpvit_edge.two_four",
}
# A module may import the leaves and its own package; only the listed packages reach further.
LEAVES = {"lpvit_edge.deps", "lpvit_edge.errors"}
REACHES = {
    "lpvit_engines": {"lpvit_engines"},
    "lpvit_profilers": {"lpvit_profilers"},
    "lpvit_edge": {"lpvit_edge", "lpvit_engines", "lpvit_profilers"},
}
FOLDERS = {
    "lpvit_edge": "lpvit_edge",
    "lpvit_engines": "engines/lpvit_engines",
    "lpvit_profilers": "profilers/lpvit_profilers",
}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            yield name, path


MODULES = list(modules())


def imports(tree: ast.AST, *, module_level: bool) -> Iterator[str]:
    """Modules a file imports; with module_level, only those it imports when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (module_level and is_deferred(node)):
            yield from imports(node, module_level=module_level)


def is_deferred(node: ast.AST) -> bool:
    """Whether the body of a node does not run when the file is imported."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_one_way(name: str, path: Path) -> None:
    package = name.partition(".")[0]
    for target in imports(ast.parse(path.read_text()), module_level=False):
        root = target.partition(".")[0]
        if root not in REACHES:
            continue
        is_leaf = any(target == leaf or target.startswith(f"{leaf}.") for leaf in LEAVES)
        assert is_leaf or root in REACHES[package], f"{name} imports {target}"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_heavy_libraries_are_not_imported_at_module_level(name: str, path: Path) -> None:
    found = {t.partition(".")[0] for t in imports(ast.parse(path.read_text()), module_level=True)}
    allowed = {"torch"} if name in TORCH_MODULES else set()
    assert not (found & HEAVY) - allowed


def test_importing_everything_public_loads_no_vendor_library() -> None:
    code = (
        "import sys, lpvit_edge.cli, lpvit_engines, lpvit_profilers\n"
        f"print(sorted(set(sys.modules) & {HEAVY | {'numpy'}!r}))"
    )
    env_path = ":".join(str(ROOT / folder) for folder in (".", "engines", "profilers"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": env_path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
