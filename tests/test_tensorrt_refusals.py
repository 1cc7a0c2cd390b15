"""What a build refuses, and what alone it may try a second time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt import build as building
from lpvit_engines.tensorrt import making, plugin, plugin_parts


def test_a_file_that_is_no_onnx_is_refused_by_its_name(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "m.onnx").write_bytes(b"not a network at all")
    device: Any = None  # refused before a device is looked at
    with pytest.raises(EngineError, match=r"m\.onnx is not an ONNX file"):
        making.make_plan(tmp_path / "m.onnx", device, proven=False)


@pytest.mark.parametrize(
    ("version", "error", "tries"),
    [
        ("10.3.0", building._ParserRefusedError("no such operator"), [True, False]),
        ("10.3.0", EngineError("out of memory"), [True]),
        ("10.16.1", building._ParserRefusedError("no such operator"), [True]),
    ],
)
def test_only_a_parser_of_10_3_that_refused_is_asked_again_weakly_typed(
    version: str,
    error: EngineError,
    tries: list[bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[bool] = []

    def refuse(_: Any, __: bytes, ___: Any, *, strongly_typed: bool) -> Any:
        tried.append(strongly_typed)
        raise error

    monkeypatch.setattr(building, "load_tensorrt", lambda: SimpleNamespace(__version__=version))
    monkeypatch.setattr(building, "_build", refuse)
    monkeypatch.setattr(plugin, "register", lambda _: None)
    with pytest.raises(type(error), match=str(error)):
        building.build(
            b"strong",
            weak=lambda: b"weak",
            sparse_weights=False,
            free_bytes=1,
            device="d",
            cache=tmp_path,
        )
    assert tried == tries


GIVEN = {"block_rows": 64, "block_cols": 16, "in_features": 768, "out_features": 3072}
SHAPES = {
    "x": (8, 197, 768), "panels": (600, 64, 64), "rows": (48, 4), "columns": (2400,),
    "bias": (3072,),
}  # fmt: skip


def test_the_inputs_of_a_sparse_layer_are_taken() -> None:
    plugin_parts.check_shapes(GIVEN, list(SHAPES.values()))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (8, 197, 767)),
        ("x", ()),
        ("panels", (600, 64, 128)),
        ("panels", (600, 32, 64)),
        ("panels", ()),
        ("rows", (49, 4)),
        ("rows", (48, 3)),
        ("columns", (2399,)),
        ("bias", (3071,)),
    ],
)
def test_inputs_that_are_not_the_layers_are_refused_before_a_kernel_reads_them(
    name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(EngineError, match=r"3072 outputs and 768 inputs in blocks of 64x16"):
        plugin_parts.check_shapes(GIVEN, list((SHAPES | {name: shape}).values()))


def test_a_batch_that_the_kernels_cannot_count_is_refused_at_build() -> None:
    batch = 2**31 // (197 * 3072)
    plugin_parts.check_shapes(GIVEN, list((SHAPES | {"x": (batch, 197, 768)}).values()))
    with pytest.raises(EngineError, match="use a smaller batch"):
        plugin_parts.check_shapes(GIVEN, list((SHAPES | {"x": (batch + 1, 197, 768)}).values()))


def test_more_tokens_than_one_launch_computes_are_refused_at_build() -> None:
    """Narrow layers reach the limit of the grid before that of the 32-bit count."""
    given = GIVEN | {"in_features": 64, "out_features": 64}
    shapes = {
        "panels": (1, 64, 64), "rows": (1, 4), "columns": (4,), "bias": (64,),
    }  # fmt: skip
    most = 65_535 * 64
    plugin_parts.check_shapes(given, [(most, 64), *shapes.values()])
    with pytest.raises(EngineError, match=f"one launch computes up to {most}; use"):
        plugin_parts.check_shapes(given, [(most + 1, 64), *shapes.values()])
