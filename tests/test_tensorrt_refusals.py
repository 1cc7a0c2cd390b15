"""What a build refuses, and what alone it may try a second time."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lpvit_edge.errors import EngineError
from lpvit_engines.tensorrt import build as building
from lpvit_engines.tensorrt import making, plugin


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
            b"strong", weak=b"weak", sparse_weights=False, free_bytes=1, device="d", cache=tmp_path
        )
    assert tried == tries
