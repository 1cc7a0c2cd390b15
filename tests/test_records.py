"""Files that earlier versions wrote stay readable: one of every kind and format is kept."""

from pathlib import Path

import msgspec
import pytest

from lpvit_edge import (
    files,
    floor,
    matching,
    optimize,
    profile_partial,
    recipe,
    records,
    run_folder,
)
from lpvit_edge.records import Record

KEPT = Path(__file__).parent / "fixtures/records"


def kinds() -> dict[str, type[Record]]:
    """Every kind of file by its name."""
    found: list[type[Record]] = [
        run_folder.Run,
        optimize.Curve,
        floor.FloorSearch,
        recipe.FinetuneLog,
        matching.MatchLog,
        profile_partial.PartialProfile,
    ]
    for value in vars(records).values():
        if isinstance(value, type) and issubclass(value, Record) and value is not Record:
            found.append(value)
    return {kind.KIND: kind for kind in found}


KINDS = kinds()


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.json")), ids=lambda path: path.name)
def test_a_kept_file_still_reads(path: Path) -> None:
    kind = KINDS[msgspec.json.decode(path.read_bytes())["kind"]]
    assert files.load(kind, path).KIND == kind.KIND


def test_every_kind_of_record_has_a_kept_file_of_its_current_format() -> None:
    kept = {
        (fields["kind"], fields["format"])
        for fields in (msgspec.json.decode(path.read_bytes()) for path in KEPT.glob("*.json"))
    }
    assert {(kind.KIND, kind.FORMAT) for kind in KINDS.values()} <= kept


@pytest.mark.parametrize(
    ("engine", "precision"), [("tensorrt", "float16"), ("openvino", "float32")]
)
def test_an_old_profile_says_in_which_precision_it_was_measured(
    engine: str, precision: str, tmp_path: Path
) -> None:
    fields = msgspec.json.decode((KEPT / "device_profile.4.json").read_bytes())
    assert fields["precision"] == "float32"
    path = tmp_path / "device_profile.json"
    path.write_bytes(msgspec.json.encode({**fields, "engine": engine}))
    assert files.load(records.DeviceProfile, path).precision == precision
