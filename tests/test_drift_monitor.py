"""Behind a line: alarms are told, strange pictures are kept, the denser bundle is called for."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpvit_edge import files
from lpvit_edge.dashboard.hub import Hub
from lpvit_edge.dashboard.power import PowerMonitor
from lpvit_edge.drift.monitor import DriftMonitor, DriftSample, RetrainRequest
from lpvit_edge.drift.past import is_due, save_past
from lpvit_edge.drift.reference import Reference, build_reference, save_reference
from lpvit_edge.drift.rules import Rules
from lpvit_edge.line.records import FrameRecord, StageLatency
from tests.test_drift import frames

Told = list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return build_reference(frames(300, 1), frames(900, 2))[0]


def monitor(
    reference: Reference, folder: Path, told: Told, *, rules: Rules | None = None
) -> tuple[DriftMonitor, list[str]]:
    called: list[str] = []
    watched = DriftMonitor(
        reference,
        rules or Rules(sample=5),
        folder=folder,
        tell=lambda kind, text, severity, _: told.append((kind, text, severity)),
        fall_back=called.append,
    )
    return watched, called


def feed(watched: DriftMonitor | Hub, count: int, *, at: float, first: int = 0) -> None:
    seen = frames(count, 7, at=at)
    image = np.full((32, 32, 3), 128, np.uint8)
    for number in range(count):
        record = FrameRecord(
            number=first + number,
            source="test",
            captured_at=1000.0 + number,
            captured_ns=number,
            verdict="ok",
            action="pass",
            latency=StageLatency(total_ms=5.0),
            probabilities=tuple(float(p) for p in seen.probabilities[number]),
        )
        if isinstance(watched, Hub):
            watched.publish_frame(record, seen.features[number], image)
        else:
            watched.see(record, seen.features[number], image)


def test_a_red_alarm_is_told_once_and_leaves_a_request_with_pictures(
    reference: Reference, tmp_path: Path
) -> None:
    told: Told = []
    watched, called = monitor(reference, tmp_path, told)
    feed(watched, 120, at=3.0)
    assert [(kind, severity) for kind, _, severity in told] == [
        ("drift", "warning"),
        ("drift", "alarm"),
    ]
    assert [reason.startswith("red drift alarm") for reason in called] == [True]
    (request_file,) = tmp_path.glob("drift-*/retrain.json")
    request = files.load(RetrainRequest, request_file)
    assert len(request.sample) == 5
    noted = files.load(DriftSample, request_file.with_name("sample.json"))
    assert noted.sample == request.sample
    assert all((request_file.parent / one.file).is_file() for one in request.sample)
    state, reason = watched.drift_now(not_watched=3)
    assert state is not None
    assert (state.level, state.not_watched, reason) == ("red", 3, None)


def test_pictures_of_the_latest_alarms_are_kept_and_no_more(
    reference: Reference, tmp_path: Path
) -> None:
    for begin in (0, 1000, 2000):  # three starts of the line
        watched, called = monitor(reference, tmp_path, [], rules=Rules(sample=1, samples=2))
        feed(watched, 60, at=3.0, first=begin)
        assert len(called) == 1
    kept = sorted(path.name for path in tmp_path.glob("drift-*"))
    assert len(kept) == 2
    assert [int(name.removeprefix("drift-")) // 1000 for name in kept] == [1, 2]


def remembered(watched: DriftMonitor) -> int:
    return int(watched._watch.past()["of"].sum())


def test_what_a_line_has_shown_is_kept_over_restarts(reference: Reference, tmp_path: Path) -> None:
    told: Told = []
    file = tmp_path / "drift" / "past-a.safetensors"

    def start() -> DriftMonitor:
        return DriftMonitor(
            reference, Rules(), folder=tmp_path, past=file,
            tell=lambda kind, text, severity, _: told.append((kind, text, severity)),
        )  # fmt: skip

    first = start()
    feed(first, 1000, at=0.0)
    assert remembered(start()) == 1000  # that one was killed
    feed(first, 50, at=0.0)
    first.close()
    second = start()
    assert remembered(second) == 1050
    assert {name: values.tolist() for name, values in second._watch.past().items()} == {
        name: values.tolist() for name, values in first._watch.past().items()
    }
    told.clear()
    file.write_bytes(file.read_bytes()[:-8])
    assert remembered(start()) == 0
    save_past({"of": np.zeros(2, np.int64)}, file)
    assert remembered(start()) == 0
    assert [severity for _, _, severity in told] == ["warning", "warning"]
    assert "cannot be read" in told[0][1]
    assert "not the past of a line with this reference" in told[1][1]


def test_the_past_is_written_ever_less_often_and_of_four_references_at_most(
    tmp_path: Path,
) -> None:
    written, writes = 0, 0
    for seen in range(0, 1_000_000, 100):
        if is_due(seen, written):
            written, writes = seen, writes + 1
    assert 10 < writes < 100
    for number in range(6):
        path = tmp_path / f"past-{number}.safetensors"
        save_past({"of": np.zeros(2, np.int64)}, path)
        os.utime(path, (number, number))
    assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "past-5.safetensors").exists()


def test_the_arrays_of_a_reference_can_be_read_by_the_service_s_user(
    reference: Reference, tmp_path: Path
) -> None:
    (tmp_path / "usual").touch()
    save_reference(
        reference, tmp_path, onnx_sha256="0" * 64, engine="fake", images=(300, 900), shrinkage=0.1
    )
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "reference.safetensors").stat().st_mode == usual


def test_frames_that_were_never_judged_are_passed_over(
    reference: Reference, tmp_path: Path
) -> None:
    watched, _ = monitor(reference, tmp_path, [])
    record = FrameRecord(
        number=1,
        source="test",
        captured_at=1.0,
        captured_ns=1,
        verdict="safe",
        action="reject",
        latency=StageLatency(total_ms=5.0),
    )
    watched.see(record, None, None)
    assert watched.drift_now(not_watched=0) == (None, "no frame has been looked at yet")


def test_a_disk_that_takes_nothing_ends_the_sample_and_not_the_watch(
    reference: Reference, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    told: Told = []
    watched, called = monitor(reference, tmp_path / "file", told)
    feed(watched, 120, at=3.0)
    assert [reason.startswith("red drift alarm") for reason in called] == [True]
    assert "disk" in [kind for kind, _, _ in told]
    state, _ = watched.drift_now(not_watched=0)
    assert state is not None
    assert state.frames == 120


def test_samples_that_cannot_be_listed_end_no_watch(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drift-000000001").mkdir()
    stat = Path.stat

    def refused(self: Path, **options: Any) -> Any:
        if self.name == "drift-000000001":
            raise OSError(5, "Input/output error")
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", refused)
    told: Told = []
    watched, called = monitor(reference, tmp_path, told)
    feed(watched, 120, at=3.0)
    assert len(called) == 1
    assert "old samples are not removed: [Errno 5] Input/output error" in told[1][1]


def test_an_engine_of_another_model_is_said_once(reference: Reference, tmp_path: Path) -> None:
    told: Told = []
    watched, _ = monitor(reference, tmp_path, told)
    seen = frames(3, 1)
    record = FrameRecord(
        number=1,
        source="test",
        captured_at=1.0,
        captured_ns=1,
        verdict="ok",
        action="pass",
        latency=StageLatency(total_ms=5.0),
        probabilities=(0.5, 0.5),
    )
    for _ in range(3):
        watched.see(record, seen.features[0], np.zeros((8, 8, 3), np.uint8))
    assert len(told) == 1
    state, reason = watched.drift_now(not_watched=0)
    assert state is None
    assert reason is not None
    assert "2,) classes" in reason


def test_the_hub_shows_what_the_monitor_sees(reference: Reference, tmp_path: Path) -> None:
    watched, _ = monitor(reference, tmp_path, [])
    power = PowerMonitor(None, reason="no sensor")
    hub = Hub(device={}, power=power, watcher=watched)
    with hub:
        feed(hub, 50, at=0.0)
    now = hub.now()
    assert now.drift is not None
    assert now.drift.frames + now.drift.not_watched == 50
    assert now.shadow_reason == "no dense engine runs beside this line"
