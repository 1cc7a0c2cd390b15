"""What earlier versions left beside an ONNX file stays readable: one of every format is kept."""

from pathlib import Path

import msgspec
import pytest

from lpvit_engines.tensorrt import plan_file, ranges

KEPT = Path(__file__).parent / "fixtures/plans"


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
