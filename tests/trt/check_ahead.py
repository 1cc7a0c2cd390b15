"""The plugin's form without Python, with the classes of the real bindings; see check.py."""

import re
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lpvit_edge.errors import EngineError
from lpvit_engines.cuda.manifest import shipped_manifest
from lpvit_engines.tensorrt import ahead_of_time, forms, plugin


class Number:
    """What an expression comes to; made into one of TensorRT's below."""

    number: int

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.number


class Arithmetic:
    """Stands in for TensorRT's IExprBuilder, whose expressions are numbers here."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt
        self.made: list[Any] = []
        self._class: Any = type("DimensionExpr", (Number, trt.IDimensionExpr), {})

    def constant(self, number: int) -> Any:
        made: Any = self._class.__new__(self._class)
        made.number = int(number)
        self.made.append(made)
        return made

    def operation(self, op: Any, a: Any, b: Any) -> Any:
        operations = self._trt.DimensionOperation
        if op == operations.CEIL_DIV:
            return self.constant(-(-a.number // b.number))
        results = {operations.PROD: a.number * b.number, operations.SUM: a.number + b.number}
        return self.constant(results[op])


def ahead_of_time_works(trt: Any) -> list[Any]:
    """The form that needs no Python at run time, with the real classes behind tensorrt.plugin."""
    sys.modules["tensorrt.plugin"] = import_module("tensorrt_bindings.plugin")
    creators: dict[tuple[str, str, str], Any] = {}
    registered = 0

    def register_creator(creator: Any, namespace: str) -> bool:
        nonlocal registered
        registered += 1
        creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    registry = SimpleNamespace(  # tensorrt.plugin asks what is there
        register_creator=register_creator, get_creator=lambda *key: creators.get(key)
    )
    trt.get_plugin_registry = lambda: registry
    key = ("BlockSparseLinear", "1", "lpvit")
    plugin.register(trt)
    plugin.register(trt)
    assert type(creators[key]) is plugin.creator_class(trt)
    assert registered == 1
    with pytest.raises(EngineError, match="in the form that calls Python"):
        ahead_of_time.register(trt)
    forms._known.clear()  # as in another process
    creators.clear()
    ahead_of_time.register(trt)
    ahead_of_time.register(trt)
    assert registered == 2
    with pytest.raises(EngineError, match="in the form of python_free plans"):
        plugin.register(trt)
    integers = {"block_rows": 64, "block_cols": 16, "in_features": 768, "out_features": 3072}
    arrays = {name: np.array([value], np.int32) for name, value in integers.items()}
    text = np.frombuffer(b"gelu", np.int8).copy()
    fields = [trt.PluginField(n, array, trt.PluginFieldType.INT32) for n, array in arrays.items()]
    fields.append(trt.PluginField("activation", text, trt.PluginFieldType.CHAR))
    creator = creators[key]
    assert sorted(field.name for field in creator.field_names) == ["activation", *sorted(integers)]
    made = creator.create_plugin(
        "BlockSparseLinear", "lpvit", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.UNKNOWN,
    )  # fmt: skip
    kept = [made]
    assert isinstance(made, trt.IPluginV3QuickAOTBuild)
    found = {n: v if isinstance(v, str) else int(v[0]) for n, v in made.attrs.items()}
    assert found == {**integers, "activation": "gelu"}, found
    half, int32 = trt.DataType.HALF, trt.DataType.INT32
    types = [half, half, int32, int32, half]
    assert made.get_output_data_types(types, [3, 3, 2, 1, 1]) == [half]

    builder = Arithmetic(trt)
    symbols: Any = import_module("tensorrt_bindings.plugin._tensor")
    symbols.SymIntExpr._exprBuilder = builder
    made_of_it = symbols.SymExprImpl  # write-only: what it was made of stays beside it
    symbols.SymExprImpl = lambda expression: (made_of_it(expression), expression)
    shapes = [(2, 197, 768), (600, 64, 64), (48, 4), (2400,), (3072,)]
    made.input_descs = [_symbolic(symbols, t, s) for t, s in zip(types, shapes, strict=True)]
    large = _symbolic(symbols, half, (5000, 197, 768))
    output = made.register_function(*made.input_descs, **made.attrs)
    assert [output.shape_expr[i].constant_value() for i in range(3)] == [2, 197, 3072]
    made.output_descs = (output,)
    in_out = [trt.DynamicPluginTensorDesc() for _ in range(6)]
    for one, kind, shape in zip(in_out, [*types, half], [*shapes, (2, 197, 3072)], strict=True):
        one.desc.type, one.desc.format = kind, trt.TensorFormat.LINEAR
        one.desc.dims = one.min = one.opt = one.max = trt.Dims(shape)
    made.set_tactic(0)
    launch, setter = SimpleNamespace(), _Setter()
    made.get_launch_params([], in_out, 5, launch, setter, builder)
    image = (
        shipped_manifest()
        .find(block_rows=64, block_cols=16, dtype="float16", epilogue="gelu")
        .images["ptx"]
    )
    names = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")
    launched = [_value(getattr(launch, name)) for name in names]
    assert launched == [48, 7, 1, image.warps * 32, 1, 1, image.shared_bytes], launched
    assert [_value(x) for x in setter.numbers] == [2 * 197, 768, 3072]
    right, made.input_descs[0] = made.input_descs[0], large
    with pytest.raises(EngineError, match="985000 tokens of 3072 features: the kernels count up"):
        made.get_launch_params([], in_out, 5, SimpleNamespace(), _Setter(), builder)
    made.input_descs[0] = right
    descs = [one.desc for one in in_out]
    name, ptx = made.get_kernel(descs[:5], descs[5:])
    assert name == "block_sparse_linear"
    assert len(re.findall(rb"\.param \.u64", ptx)) == 6
    assert len(re.findall(rb"\.param \.u32", ptx)) == 3
    return [*kept, *builder.made]


class _Setter:
    """Stands in for what TensorRT takes the kernel's numbers with."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.numbers: list[Any] = []

    def __setitem__(self, index: int, expression: Any) -> None:
        assert index == len(self.numbers)
        self.numbers.append(expression)


def _symbolic(symbols: Any, kind: Any, shape: tuple[int, ...]) -> Any:
    desc = symbols.TensorDesc()
    desc.dtype, desc.shape_expr = kind, symbols.ShapeExprs(len(shape))
    for index, size in enumerate(shape):
        desc.shape_expr[index] = symbols.ShapeExpr(size)
    desc._immutable = True
    return desc


def _value(pair: tuple[Any, Any]) -> int:
    """Of an ISymExpr, beside which its expression lies."""
    return int(pair[1]._expr.number)
