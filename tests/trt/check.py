"""Run with the real bindings on the path: check each use on stdin, then exercise what can run.

Prints one JSON object. Ends with os._exit: on 10.3 the destructor of a plugin crashes.
"""

import inspect
import json
import os
import re
import struct
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_KEPT: list[Any] = []  # plugins, which 10.3 must not destroy
_OPTIONAL = {"IPluginV3.destroy", "IPluginV3OneBuild.get_valid_tactics"}


def split(text: str) -> list[str]:
    """Parts between commas outside brackets."""
    parts: list[str] = []
    depth, part = 0, ""
    for char in text:
        depth += (char in "[(<{") - (char in "])>}")
        if char == "," and depth == 0:
            parts, part = [*parts, part.strip()], ""
        else:
            part += char
    return [p for p in (*parts, part.strip()) if p]


def overloads(function: Any) -> list[list[tuple[str, bool]]]:
    """Parameters (name, has a default) of each overload, from pybind11's docstring."""
    found = []
    pattern = re.compile(rf"\s*(?:\d+\.\s*)?{re.escape(function.__name__)}\((.*)\)\s*->")
    for line in (function.__doc__ or "").splitlines():
        match = pattern.match(line)
        if match and "*args" not in match[1]:
            parts = split(match[1])
            named = [
                (p.split(":")[0].split("=")[0].strip(), "=" in p.split(":", 1)[-1]) for p in parts
            ]
            found.append(named[1:] if named and named[0][0] in ("self", "arg0") else named)
    return found


def accepts(function: Any, positional: int, keywords: list[str]) -> bool:
    for parameters in overloads(function):
        names = [name for name, _ in parameters]
        if positional > len(parameters) or any(k not in names[positional:] for k in keywords):
            continue
        if all(default or name in keywords for name, default in parameters[positional:]):
            return True
    return False


def problem_of(trt: Any, use: dict[str, Any]) -> str | None:
    """Why the bindings do not offer a use; None where they do."""
    if use["kind"] == "name":
        return None if hasattr(trt, use["class"]) else "no such name"
    if use["kind"] == "construct" and not isinstance(getattr(trt, use["class"], None), type):
        return None if callable(getattr(trt, use["class"], None)) else "no such function"
    owner = getattr(trt, use["class"], None)
    if owner is None or not hasattr(owner, use["member"]):
        return "no such member"
    if use["kind"] == "enum":
        return None if use["member"] in owner.__members__ else "no such value"
    static = inspect.getattr_static(owner, use["member"])
    if use["kind"] in ("read", "write"):
        if not isinstance(static, property):
            return "not a property"
        return "read-only" if use["kind"] == "write" and static.fset is None else None
    member = getattr(owner, use["member"])
    if accepts(member, use["positional"], use["keywords"]):
        return None
    return f"arguments do not fit {overloads(member)}"


def overridden(trt: Any) -> list[str]:
    """Methods that TensorRT will call and we lack, or that cannot take the call."""
    from lpvit_engines.tensorrt import log, plugin, progress, times

    plugin_class = plugin.plugin_class(trt)
    subclasses = (
        (plugin_class, trt.IPluginV3), (plugin_class, trt.IPluginV3OneCore),
        (plugin_class, trt.IPluginV3OneBuild), (plugin_class, trt.IPluginV3OneRuntime),
        (plugin.creator_class(trt), trt.IPluginCreatorV3One),
        (type(log.make_logger(trt, log.Log())), trt.ILogger),
        (type(progress.make_monitor(trt, None, lambda: False)), trt.IProgressMonitor),
        (type(times.make_profiler(trt, {})), trt.IProfiler),
    )  # fmt: skip
    return [
        f"{base.__name__}.{name}: {problem}"
        for ours, base in subclasses
        for name, member in vars(base).items()
        if callable(member) and not isinstance(member, type) and not name.startswith("_")
        if f"{base.__name__}.{name}" not in _OPTIONAL
        if (problem := unfit(ours, base, name)) is not None
    ]


def unfit(ours: type, base: type, name: str) -> str | None:
    """Why a method that TensorRT calls cannot be called on our class; None where it can."""
    owner = next(cls for cls in ours.__mro__ if name in vars(cls))
    if not owner.__module__.startswith("lpvit"):
        return "we have none of our own"
    want = {len(parameters) for parameters in overloads(getattr(base, name))}
    have = len(inspect.signature(getattr(ours, name)).parameters) - 1
    return None if have in want else f"{have} parameters, {sorted(want)} wanted"


def plugin_refuses_other_shapes(trt: Any, made: Any) -> None:
    """At build and where a shape changes, with TensorRT's own descriptions."""
    from lpvit_edge.errors import EngineError

    right = [(1, 197, 768), (600, 64, 64), (48, 4), (2400,), (3072,)]
    at_build = [trt.DynamicPluginTensorDesc() for _ in right]
    at_run = [trt.PluginTensorDesc() for _ in right]
    for index, shape in enumerate(right):
        at_build[index].desc.dims = at_build[index].max = trt.Dims(shape)
        at_run[index].dims = trt.Dims(shape)
    made.configure_plugin(at_build, [])
    made.on_shape_change(at_run, [])
    at_build[0].desc.dims = trt.Dims((-1, 197, 768))  # an open batch counts at its largest
    made.configure_plugin(at_build, [])
    at_build[0].max = trt.Dims((10_000, 197, 768))
    at_run[4].dims = trt.Dims((3071,))
    for call, given in ((made.configure_plugin, at_build), (made.on_shape_change, at_run)):
        try:
            call(given, [])
        except EngineError:
            continue
        raise AssertionError(f"{call.__name__} took shapes that are not the layer's")


def plugin_tells_its_output(trt: Any, made: Any) -> None:
    """The output has X's axes, of which the last becomes out_features."""
    constants: list[int] = []
    written: list[tuple[int, Any]] = []

    class Expressions(trt.IExprBuilder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IExprBuilder.__init__(self)

        def constant(self, value: int) -> Any:  # of which there are none without TensorRT
            constants.append(value)

    class Shape(trt.DimsExprs):  # type: ignore[misc]
        def __setitem__(self, index: int, value: Any) -> None:
            written.append((index, value))
            super().__setitem__(index, value)

    of_x = trt.DimsExprs(3)
    made.trt = SimpleNamespace(DimsExprs=Shape)
    shapes = made.get_output_shapes([of_x, *[trt.DimsExprs(1)] * 4], [], Expressions())
    made.trt = trt
    assert [len(shape) for shape in shapes] == [3]
    assert shapes[0] is not of_x
    assert constants == [3072]
    assert written == [(2, None)]
    assert made.get_output_data_types([trt.DataType.HALF] * 5) == [trt.DataType.HALF]


def plugin_is_copied_with_its_kernel(trt: Any, made: Any) -> None:
    """Into execution contexts, and by TensorRT's own threads, which have no CUDA context."""
    for twin in (made.clone(), made.attach_to_context(None)):
        _KEPT.append(twin)
        assert twin is not made
        assert (twin.given, twin.kernel) == (made.given, made.kernel)
        assert (twin.plugin_namespace, twin.num_outputs) == ("lpvit", 1)
        kinds = ("CORE", "BUILD", "RUNTIME")
        for kind in (getattr(trt.PluginCapabilityType, name) for name in kinds):
            assert twin.get_capability_interface(kind) is twin
        twin.set_tactic(0)
        assert twin.get_workspace_size([], []) == 0


def plugin_works(trt: Any, library: str) -> None:
    """The creator and the plugin with real TensorRT objects, on the fake driver."""
    import numpy as np

    from lpvit_engines.tensorrt import plugin, plugin_fields
    from tests.cuda.fake_driver import state_of

    state = state_of(Path(library))
    integers = {"block_rows": 64, "block_cols": 16, "in_features": 768, "out_features": 3072}
    arrays = {name: np.array([value], np.int32) for name, value in integers.items()}
    text = np.frombuffer(b"gelu", np.int8).copy()
    fields = [
        trt.PluginField(name, array, trt.PluginFieldType.INT32) for name, array in arrays.items()
    ]
    fields.append(trt.PluginField("activation", text, trt.PluginFieldType.CHAR))
    creator = plugin.creator_class(trt)(library)
    assert sorted(field.name for field in creator.field_names) == ["activation", *sorted(integers)]
    made = creator.create_plugin("fc1", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    assert made.given == {**integers, "activation": "gelu"}, made.given
    assert (made.plugin_name, made.plugin_version) == ("BlockSparseLinear", "1")
    assert (made.plugin_namespace, made.num_outputs) == ("lpvit", 1)
    again = plugin_fields.read_fields(made.get_fields_to_serialize())
    assert again == made.given, again
    _KEPT.append(made)
    plugin_is_copied_with_its_kernel(trt, made)
    described = [trt.DynamicPluginTensorDesc() for _ in range(6)]
    for index, one in enumerate(described):
        one.desc.type = trt.DataType.INT32 if index in (2, 3) else trt.DataType.HALF
        one.desc.format = trt.TensorFormat.LINEAR
    assert all(made.supports_format_combination(i, described, 5) for i in range(6))
    described[0].desc.type = trt.DataType.FLOAT
    assert not made.supports_format_combination(0, described, 5)
    described[1].desc.format = trt.TensorFormat.CHW32
    assert not made.supports_format_combination(1, described, 5)
    plugin_tells_its_output(trt, made)
    plugin_refuses_other_shapes(trt, made)

    class Description:
        def __init__(self, *dims: int) -> None:
            self.dims = trt.Dims(dims)

    inputs = [Description(1, 197, 768), None, Description(48, 4), None, None]
    addresses = [0x100 * i for i in range(1, 6)]
    made.enqueue(inputs, [Description(1, 197, 3072)], addresses, [0x900], 0, 0x77)
    assert (state.launches, state.stream) == (1, 0x77)
    assert tuple(state.grid) == (48, 4, 1)  # block rows, tiles of 64 tokens
    assert struct.unpack_from("@6Q3iQ", bytes(state.parameters)) == (
        *addresses, 0, 197, 768, 3072, 0x900,
    )  # fmt: skip
    assert state.cubin_loads == 1


def listeners_work(trt: Any) -> None:
    from lpvit_engines.tensorrt import log, progress, times

    kept = log.Log()
    log.make_logger(trt, kept).log(trt.ILogger.Severity.ERROR, "it failed")
    assert kept.faults == ["it failed"]
    steps: list[tuple[str, int, int]] = []
    stopped: list[bool] = []
    monitor = progress.make_monitor(trt, lambda *step: steps.append(step), lambda: bool(stopped))
    monitor.phase_start("build", None, 3)
    assert monitor.step_complete("build", 1) is True
    monitor.phase_finish("build")
    assert steps == [("build", 0, 3), ("build", 2, 3), ("build", 3, 3)]
    stopped.append(True)
    assert monitor.step_complete("build", 1) is False
    samples: dict[str, list[float]] = {}
    times.make_profiler(trt, samples).report_layer_time("fc1", 0.5)
    assert samples == {"fc1": [0.5]}


def numpy_is_judged(trt: Any) -> str:
    """ "ok", or the refusal's words."""
    from lpvit_edge.errors import EnvironmentUnfitError
    from lpvit_engines.tensorrt.library import load_tensorrt

    try:
        load_tensorrt()
    except EnvironmentUnfitError as error:
        return str(error)
    return "ok"


def main() -> None:
    given = json.load(sys.stdin)
    import numpy

    trt: Any = import_module("tensorrt")
    from lpvit_engines.tensorrt.ahead_of_time import OLDEST
    from lpvit_engines.tensorrt.library import version_of
    from tests.trt.check_ahead import ahead_of_time_works

    judged = numpy_is_judged(trt)
    problems = [
        f"{use['file']}:{use['line']}: {use['class']}.{use['member']}: {problem}"
        for use in given["uses"]
        if (problem := problem_of(trt, use))
    ]
    result = {"version": trt.__version__, "numpy": numpy.__version__, "judged": judged}
    failures = []
    try:
        listeners_work(trt)
        if judged == "ok":
            plugin_works(trt, given["library"])
            if version_of(trt) >= OLDEST:
                _KEPT.append(ahead_of_time_works(trt))
    except Exception:
        failures.append(traceback.format_exc())
    found = {"problems": problems, "overridden": overridden(trt), "failures": failures}
    sys.stdout.write(json.dumps({**result, **found}))
    sys.stdout.flush()
    os._exit(0)


main()
