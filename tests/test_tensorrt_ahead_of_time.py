"""The plugin's form without Python: its PTX computes the same, and a plan says that it has it.

That TensorRT's own classes take it is in test_tensorrt_contract.py.
"""

import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpvit_edge.errors import EngineError, EnvironmentUnfitError
from lpvit_engines.cuda import manifest as kernels
from lpvit_engines.cuda.manifest import Epilogue
from lpvit_engines.tensorrt import ahead_of_time
from lpvit_engines.tensorrt.device import opened
from lpvit_engines.tensorrt.kept import proven_plan
from lpvit_engines.tensorrt.making import make_plan
from tests.cuda.fake_driver import compile_fake_driver
from tests.cuda.layers import Case, assert_close, layer
from tests.cuda.ptx.launch import launch
from tests.cuda.ptx_run import Arguments
from tests.cuda.runtime_driver import Driver
from tests.test_tensorrt_int8 import block_layer, two_four_layer
from tests.trt.fake_builder import building_tensorrt

SHAPES = [(v.block_rows, v.block_cols, v.epilogue) for v in kernels.shipped_manifest().variants
          if v.dtype == "float16" and v.epilogue != "residual"]  # fmt: skip


@pytest.mark.parametrize(("block_rows", "block_cols", "epilogue"), SHAPES)
def test_the_trimmed_ptx_computes_the_layer_from_what_tensorrt_passes(
    block_rows: int, block_cols: int, epilogue: Epilogue
) -> None:
    """Executed instruction by instruction, the parameters in TensorRT's order."""
    case = Case(block_rows=block_rows, block_cols=block_cols, epilogue=epilogue, tokens=40)
    problem = layer(case)
    variant = kernels.shipped_manifest().find(
        block_rows=block_rows, block_cols=block_cols, dtype="float16", epilogue=epilogue
    )
    given = Arguments(case, problem)
    inputs = (given.x, given.values, given.rows, given.columns, given.bias)
    numbers = (case.tokens, case.in_features, given.out_features)
    launch(
        ahead_of_time.trimmed_ptx(kernels.shipped_manifest(), variant),
        grid=given.grid,
        threads=variant.images["ptx"].warps * 32,
        shared_bytes=variant.images["ptx"].shared_bytes,
        parameters=struct.pack("<5Q3i4xQ", *inputs, *numbers, given.y),
        memory=given.memory,
    )
    assert_close(given.result(), case, problem.expected)


def test_a_kernel_that_reads_what_a_plan_cannot_pass_is_refused() -> None:
    manifest = kernels.shipped_manifest()
    variant = manifest.find(block_rows=64, block_cols=16, dtype="float16", epilogue="residual")
    with pytest.raises(EngineError, match="reads residual, which a plan cannot pass"):
        ahead_of_time.trimmed_ptx(manifest, variant)


def test_tensorrt_10_3_is_told_that_it_cannot() -> None:
    with pytest.raises(EnvironmentUnfitError, match=r"10\.3\.0 keeps no kernels.*10\.9"):
        ahead_of_time.register(SimpleNamespace(__version__="10.3.0"))


def test_the_manifest_says_whether_a_plan_needs_python(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(compile_fake_driver(tmp_path_factory.mktemp("driver"), source="fake_runtime.c"))
    forms: list[str] = []
    trt: Any = building_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(ahead_of_time, "register", lambda trt: forms.append("ptx"))
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: forms.append("py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.onnx"
    path.write_bytes(block_layer().SerializeToString())
    with opened(driver.path) as device, device.calls.current(device.context):
        calling = make_plan(path, device, proven=False)
        assert (calling.python_free, forms[0]) == (False, "py")
        forms.clear()
        free = make_plan(path, device, proven=False, python_free=True)
        assert (free.python_free, forms[0]) == (True, "ptx")
        forms.clear()
        path.write_bytes(two_four_layer().SerializeToString())
        plain = make_plan(path, device, proven=True)
        assert (plain.python_free, forms) == (True, [])  # nothing in it is a plugin
        kept = proven_plan(path, device, precision="float16", python_free=True)
        assert kept is not None
        assert kept.manifest == plain
