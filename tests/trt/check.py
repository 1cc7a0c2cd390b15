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
from typing import Any

_KEPT: list[Any] = []  # plugins, which 10.3 must not destroy


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
    """Methods of ours that cannot take the call that TensorRT will make."""
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
    wrong = []
    checked: set[str] = set()
    for ours, base in subclasses:
        for name, member in vars(base).items():
            mine = getattr(ours, name, None)
            if name.startswith("_") or not callable(member) or mine in (None, member):
                continue
            checked.add(f"{base.__name__}.{name}")
            want = {len(parameters) for parameters in overloads(getattr(base, name))}
            have = len(inspect.signature(mine).parameters) - 1
            if want and have not in want:
                wrong.append(f"{base.__name__}.{name}: {have} parameters, {sorted(want)} wanted")
    assert {"IPluginV3OneRuntime.enqueue", "IPluginV3OneBuild.get_output_shapes"} <= checked
    return wrong


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
    twin = made.clone()
    _KEPT.extend((made, twin))
    assert twin is not made
    assert twin.given == made.given
    assert twin.kernel is made.kernel

    described = [trt.DynamicPluginTensorDesc() for _ in range(6)]
    for index, one in enumerate(described):
        one.desc.type = trt.DataType.INT32 if index in (2, 3) else trt.DataType.HALF
        one.desc.format = trt.TensorFormat.LINEAR
    assert all(made.supports_format_combination(i, described, 5) for i in range(6))
    described[0].desc.type = trt.DataType.FLOAT
    assert not made.supports_format_combination(0, described, 5)
    described[1].desc.format = trt.TensorFormat.CHW32
    assert not made.supports_format_combination(1, described, 5)
    assert made.get_output_data_types([trt.DataType.HALF] * 5) == [trt.DataType.HALF]

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
