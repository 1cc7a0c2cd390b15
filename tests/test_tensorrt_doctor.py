"""The doctor builds one layer of each form with TensorRT and says what to do where it cannot."""

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lpvit_edge import doctor_tensorrt
from lpvit_edge.doctor import Finding, _builds, layer_name
from lpvit_edge.doctor_tensorrt import JETPACKS, examine_tensorrt
from lpvit_engines.tensorrt.device import opened
from lpvit_profilers.device import DeviceIdentity, identify
from tests.cuda.fake_driver import compile_fake_driver
from tests.cuda.runtime_driver import Driver
from tests.trt.fake_builder import building_tensorrt


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_driver(tmp_path_factory.mktemp("driver"), source="fake_runtime.c")


def jetson(jetpack: str | None) -> DeviceIdentity:
    return msgspec.structs.replace(identify(), jetpack=jetpack)


@pytest.fixture
def examined(library: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    driver = Driver(library)

    def examine(trt: Any, jetpack: str | None = "6.2.1") -> dict[str, Finding]:
        trt.driver = driver
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
        monkeypatch.setattr("lpvit_engines.tensorrt.device.opened", partial(opened, str(library)))
        return {finding.name: finding for finding in examine_tensorrt(jetson(jetpack))}

    return examine


def test_each_form_is_built_and_its_kernel_named(examined: Any) -> None:
    trt = building_tensorrt()
    found = examined(trt)
    assert found["one dense layer"].status == "ok"
    assert found["one 2:4 layer"].status == "ok"
    assert "sm80_xmma_sparse_gemm" in found["one 2:4 layer"].found
    assert "BlockSparseLinear" in found["one 64x16 layer"].found
    for pattern in doctor_tensorrt.LAYERS:  # float16 against float64
        words = re.fullmatch(
            r"built, right within 0\.(\d\d)%: .*", found[layer_name(pattern)].found
        )
        assert words is not None
        assert 0 < int(words[1]) < 30
    assert [config.flags for config in trt.configs] == [[], ["SPARSE_WEIGHTS"], []]


def test_the_machine_can_run_what_tensorrt_builds_even_weakly_typed(
    examined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _builds(tuple(examined(building_tensorrt()).values()))
    assert not _builds(tuple(examined(building_tensorrt(refuses="out of memory")).values()))
    build = doctor_tensorrt._build
    monkeypatch.setattr(
        doctor_tensorrt, "_build", lambda *a, **o: replace(build(*a, **o), strongly_typed=False)
    )
    weak = examined(building_tensorrt())
    assert (weak["one dense layer"].status, weak["one dense layer"].found) == (
        "warning",
        "built weakly typed",
    )
    assert _builds(tuple(weak.values()))


def test_a_layer_that_answers_wrongly_is_told_apart(
    examined: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_layer = doctor_tensorrt._one_layer

    def another(pattern: str) -> Any:
        layer = one_layer(pattern)
        wrong = layer.expected + (0.5 if pattern == "64x16" else 0.0)
        return msgspec.structs.replace(layer, expected=wrong)

    monkeypatch.setattr(doctor_tensorrt, "_one_layer", another)
    found = examined(building_tensorrt())
    assert found["one 2:4 layer"].status == "ok"
    assert found["one 64x16 layer"].status == "warning"
    assert re.match(r"answers differ by \d+\.\d+% of the largest: ", found["one 64x16 layer"].found)
    assert "build no such layers here" in (found["one 64x16 layer"].remedy or "")


def test_two_four_that_runs_dense_is_advised_against(examined: Any) -> None:
    finding = examined(building_tensorrt(sparse=False))["one 2:4 layer"]
    assert finding.status == "warning"
    assert finding.found.startswith("built with a dense kernel")
    assert "64x16" in finding.remedy


def test_what_tensorrt_says_of_a_failed_build_is_shown_with_a_remedy(examined: Any) -> None:
    finding = examined(building_tensorrt(refuses="out of memory"))["one dense layer"]
    assert finding.status == "warning"
    assert "TensorRT said: out of memory" in finding.found
    assert "free memory on the device" in finding.remedy


def test_a_numpy_that_the_bindings_corrupt_is_named_before_anything_is_built(
    examined: Any,
) -> None:
    trt = building_tensorrt()
    trt.PluginField(None).data = [7, 7, 7]
    found = examined(trt)
    assert list(found) == ["engine"]
    assert found["engine"].remedy == "pip install 'numpy<2'"
    assert trt.configs == []


@pytest.mark.parametrize(
    ("jetpack", "status", "words"),
    [
        ("6.2.1", "warning", "JetPack 6.2 brings TensorRT 10.3 and CUDA 12.6"),
        ("5.1", "warning", "JetPack 5.1 is none of 6.1, 6.2"),
        (None, "ok", ""),
    ],
)
def test_versions_are_held_against_the_jetpack(
    examined: Any, jetpack: str | None, status: str, words: str
) -> None:
    trt = building_tensorrt()
    trt.__version__ = "10.16.2"
    finding = examined(trt, jetpack)["versions"]
    assert finding.status == status
    assert words in (finding.remedy or "")
    assert JETPACKS["7.2"] == ("10.16", "13.2")


def test_little_free_memory_is_a_warning(library: Path, examined: Any) -> None:
    found = examined(building_tensorrt())["free memory"]
    assert (found.status == "warning") == (int(found.found.split()[0]) < 1500)


def test_without_a_driver_there_is_one_line_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", building_tensorrt())
    monkeypatch.setattr(
        "lpvit_engines.tensorrt.device.opened", partial(opened, "libcuda-absent.so.1")
    )
    (finding,) = examine_tensorrt(jetson(None))
    assert finding.status == "warning"
    assert "need an NVIDIA driver" in finding.found
