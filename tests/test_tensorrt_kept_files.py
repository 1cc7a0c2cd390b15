"""What lies beside an ONNX file: whole at any moment, and readable in every format."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from lpvit_engines.tensorrt import plan_file, ranges
from lpvit_engines.tensorrt.atomic import write_atomic
from tests.trt.served import ORIN, write_plan

KEPT = Path(__file__).parent / "fixtures/plans"
UPGRADED = msgspec.structs.replace(ORIN, tensorrt="10.16.2")


@pytest.mark.parametrize("path", sorted(KEPT.glob("tensorrt-plan.*.json")), ids=lambda p: p.stem)
def test_a_manifest_of_every_format_still_reads(path: Path) -> None:
    found = plan_file.read_manifest(path)
    assert path.stem == f"{found.kind}.{found.format}"
    assert [proof.kept for proof in found.proofs or ()] == [True, False]
    assert (found.compared is None) == (found.format < 4)


def test_the_format_that_is_written_now_is_kept_too() -> None:
    assert (KEPT / f"{plan_file.KIND}.{plan_file.FORMAT}.json").is_file()
    assert (KEPT / f"{ranges.KIND}.{ranges.FORMAT}.json").is_file()


def test_ranges_of_every_format_still_read(tmp_path: Path) -> None:
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"a network")
    for path in KEPT.glob("int8-ranges.*.json"):
        fields = msgspec.json.decode(path.read_bytes())
        of_this = {**fields, "onnx_sha256": plan_file.sha256(onnx.read_bytes())}
        ranges.ranges_path(onnx).write_bytes(msgspec.json.encode(of_this))
        assert ranges.read_ranges(onnx)[0].largest == fields["largest"]


def test_a_swap_cut_off_at_any_write_leaves_a_whole_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = write_plan(tmp_path)
    real = write_atomic

    def cut_off(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(plan_file, "write_atomic", cut_off)
    with pytest.raises(OSError, match="No space"):
        write_plan(tmp_path, device=UPGRADED, content=b"plan, newer")
    found = plan_file.read(onnx, ORIN)
    assert found is not None
    assert found[0] == b"plan of a model"
    monkeypatch.undo()
    write_plan(tmp_path, device=UPGRADED, content=b"plan, newest")
    assert len(list(tmp_path.glob("*.plan"))) == 1  # what was cut off is gone too


def test_whoever_reads_during_a_swap_gets_the_newer_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = write_plan(tmp_path)
    real, read = plan_file.read_manifest, []

    def swapped_after(path: Path) -> Any:
        manifest = real(path)
        read.append(manifest.plan_sha256)
        if len(read) == 1:
            write_plan(tmp_path, content=b"plan, newer")
        return manifest

    monkeypatch.setattr(plan_file, "read_manifest", swapped_after)
    found = plan_file.read(onnx, ORIN)
    assert found is not None
    assert found[0] == b"plan, newer"
    next(tmp_path.glob("*.plan")).unlink()
    assert plan_file.read(onnx, ORIN) is None
