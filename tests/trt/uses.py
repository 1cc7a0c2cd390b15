"""What the TensorRT package asks of TensorRT's bindings, read off its syntax trees.

A variable's class is declared by its name, package-wide: `config` is an IBuilderConfig. The package
keeps to these names; a chain `trt.X`, or a known variable, used in any other way is found.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "engines/lpvit_engines/tensorrt"
# By the last part of a chain without underscores: self._context is `context`.
CLASS_OF = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "expr_builder": "IExprBuilder",
    "inspector": "EngineInspector",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
}
# Names that TensorRT took away, or that mislead: never to be used.
FORBIDDEN = {
    "supports_model", "int8_calibrator", "device_memory_size", "platform_has_fast_fp16",
    "platform_has_fast_int8", "precision", "dynamic_range", "get_plugin_creator", "IStreamReader",
    "plugin_creator_list", "all_shape_inputs_specified", "algorithm_selector", "build_engine",
    "INT8", "BF16", "FP8", "INT4", "FP4", "compute_precision", "weight_streaming_budget",
}  # fmt: skip
# The one guarded exception: weakly typed float16, which build() asks for on 10.3 alone.
GUARDED = {"FP16"}


def sources() -> list[Path]:
    return sorted(PACKAGE.glob("*.py"))


def class_of(node: ast.expr) -> str | None:
    """TensorRT's class of an expression by its declared name."""
    name = node.id if isinstance(node, ast.Name) else None
    if isinstance(node, ast.Attribute):
        name = node.attr
    return CLASS_OF.get((name or "").strip("_"))


def uses(tree: ast.AST) -> Iterator[dict[str, object]]:
    """Every use: {"class", "member", "kind": "call" | "read" | "write" | "enum" | "name", ...}."""
    called = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        base = node.value
        line = {"line": node.lineno}
        if isinstance(base, ast.Name) and base.id == "trt":
            call = called.get(id(node))
            kind = "name" if call is None else "construct"
            yield {"class": node.attr, "member": "__init__", "kind": kind, **line, **_shape(call)}
        elif _is_trt_name(base):
            assert isinstance(base, ast.Attribute)
            if node.attr != "__init__":
                yield {"class": base.attr, "member": node.attr, "kind": "enum", **line}
        elif (owner := class_of(base)) is not None:
            call = called.get(id(node))
            kind = "call" if call else "write" if isinstance(node.ctx, ast.Store) else "read"
            yield {"class": owner, "member": node.attr, "kind": kind, **line, **_shape(call)}


def _is_trt_name(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and (
        isinstance(node.value, ast.Name) and node.value.id == "trt"
    )


def _shape(call: ast.Call | None) -> dict[str, object]:
    if call is None:
        return {}
    return {"positional": len(call.args), "keywords": [k.arg for k in call.keywords]}


def package_uses() -> list[dict[str, object]]:
    """Of all modules; each with the file it is in."""
    return [
        {**use, "file": path.name}
        for path in sources()
        for use in uses(ast.parse(path.read_text()))
    ]


def forbidden() -> list[str]:
    """Attributes and getattr() names on the negative list, with where they are."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value if node.value.isupper() else None
            if name in FORBIDDEN and not _is_own(node):
                found.append(f"{path.name}:{getattr(node, 'lineno', 0)}: {name}")
    return found


def _is_own(node: ast.AST) -> bool:
    """manifest.precision and the like are ours."""
    return (
        isinstance(node, ast.Attribute)
        and class_of(node.value) is None
        and not (isinstance(node.value, ast.Attribute) and _is_trt_name(node.value))
    )
