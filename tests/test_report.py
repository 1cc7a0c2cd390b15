"""The closing table and the report say what the document says, and no better."""

import copy
from pathlib import Path
from typing import Any

import pytest

from lpvit_edge import table
from lpvit_edge.report import _curve, write_report

SIDE: dict[str, Any] = {
    "latency_ms": 10.0,
    "latency_p99_ms": 11.0,
    "latency_spread_ms": 0.1,
    "latency_stable": True,
    "latency_reasons": [],
    "throughput_per_s": 100.0,
    "accuracy": 0.9,
    "accuracy_ci95": [0.88, 0.92],
    "images": 2000,
    "weight_bytes": 1_000_000,
    "energy_per_image_mj": 20.0,
    "energy_ci95_mj": 0.1,
    "energy_source": "rapl",
    "energy_scope": "cpu_package",
    "energy_quality": "measured",
    "energy_reason": None,
    "mean_power_mw": 9000.0,
}
TARGET: dict[str, Any] = {
    "quantity": "latency_ms",
    "asked": "0.5x",
    "limit": 5.0,
    "predicted": 5.0,
    "measured": 5.0,
    "measured_share": 0.5,
    "met": True,
    "reason": None,
}
LAYER = {
    "layer": "blocks.0.mlp.fc1",
    "pattern": "32x32",
    "sparsity": 0.5,
    "latency_ms": 1.0,
    "dense_latency_ms": 2.0,
    "distortion": 0.0,
}


def result(sparse: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    sides = {"dense": copy.deepcopy(SIDE), "sparse": {**copy.deepcopy(SIDE), **(sparse or {})}}
    return {
        "model": {"name": "tiny", "weights_sha256": "00", "image_size": 32},
        "engine": "openvino 1",
        "threads": 1,
        "precision": "float32",
        "batch": 1,
        **sides,
        "speedup": sides["dense"]["latency_ms"] / sides["sparse"]["latency_ms"],
        "target": "0.5x",
        "target_latency_ms": 5.0,
        "target_met": True,
        "targets": [TARGET],
        "accuracy_floor": None,
        "rotated": False,
        "finetuned": None,
        "predicted_latency_ms": 5.0,
        "prediction_error": 0.0,
        "accuracy_drop": 0.0,
        "agreement": 1.0,
        "accuracy_curve": [],
        "layers": [LAYER],
        "sum_of_parts_over_measured_dense": 1.0,
        "profile_reasons": [],
        "onnxruntime_relative_error": 1e-6,
        "engine_relative_error": 1e-6,
        "skipped_images": [],
        "device": {"machine": "x86_64"},
        "fingerprint": "f",
        "report": "report.html",
        **changes,
    }


def budget(target: float, predicted_ms: float, accuracy: float | None) -> dict[str, Any]:
    return {
        "target": target,
        "predicted_latency_ms": predicted_ms,
        "accuracy": accuracy,
        "images": 500,
    }


def html_of(content: dict[str, Any], folder: Path) -> str:
    write_report(content, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def last_column(content: dict[str, Any]) -> list[str]:
    return [row[3] for row in table.rows(content)]


WORSE = {
    "latency_ms": 12.5,
    "latency_p99_ms": 22.0,
    "throughput_per_s": 80.0,
    "weight_bytes": 1_100_000,
    "energy_per_image_mj": 30.0,
}
BETTER = {
    "latency_ms": 5.0,
    "latency_p99_ms": 4.4,
    "throughput_per_s": 250.0,
    "weight_bytes": 500_000,
    "energy_per_image_mj": 10.0,
}


def test_a_worse_engine_is_called_slower_larger_and_more() -> None:
    assert last_column(result(WORSE)) == [
        "1.25x slower",
        "2.00x slower",
        "1.25x lower",
        "0.00 points",
        "1.10x larger",
        "1.50x more (measured, cpu_package)",
    ]


def test_a_better_engine_is_called_faster_smaller_and_less() -> None:
    assert last_column(result(BETTER)) == [
        "2.00x faster",
        "2.50x faster",
        "2.50x higher",
        "0.00 points",
        "2.00x smaller",
        "2.00x less (measured, cpu_package)",
    ]


@pytest.mark.parametrize(
    ("numerator", "denominator", "text"),
    [(1.0, 1.0, "1.00x"), (1.004, 1.0, "1.00x"), (0.999, 1.0, "1.00x"), (0.9, 1.0, "1.11x worse")],
)
def test_a_ratio_that_rounds_to_one_takes_no_side(
    numerator: float, denominator: float, text: str
) -> None:
    assert table.times(numerator, denominator, "better", "worse") == text


@pytest.mark.parametrize("is_rotated", [True, False])
def test_the_report_says_whether_the_model_was_rotated(tmp_path: Path, is_rotated: bool) -> None:
    html = html_of(result(rotated=is_rotated), tmp_path)
    assert ("the residual streams were rotated" in html) is is_rotated


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (0.0, "0.00 points"),
        (-0.0, "0.00 points"),
        (-0.00004, "0.00 points"),
        (-0.0065, "-0.65 points"),
        (0.0065, "+0.65 points"),
    ],
)
def test_a_loss_of_nothing_has_no_sign(change: float, text: str) -> None:
    assert table.points(change) == text


@pytest.mark.parametrize(
    ("sparse", "drop", "headline"),
    [
        (WORSE, 0.0065, "1.25x slower on this machine, 0.65 points of accuracy lost"),
        (BETTER, 0.0, "2.00x faster on this machine, no accuracy lost"),
        (BETTER, 0.00004, "2.00x faster on this machine, no accuracy lost"),
        ({}, -0.01, "As fast as the dense engine on this machine, no accuracy lost"),
    ],
)
def test_the_headline_is_slower_when_the_engine_is(
    tmp_path: Path, sparse: dict[str, Any], drop: float, headline: str
) -> None:
    assert f"<h1>{headline}</h1>" in html_of(result(sparse, accuracy_drop=drop), tmp_path)


@pytest.mark.parametrize(
    ("target", "met", "line"),
    [
        ("0.5x", True, "0.5x met (within 5 %): 0.50x of the dense latency of the same run"),
        ("0.4x", False, "0.4x NOT met (within 5 %): 0.50x of the dense latency of the same run"),
        ("5ms", True, "5ms met (within 5 %): 5.000 ms measured"),
        ("0.004s", False, "0.004s NOT met (within 5 %): 5.000 ms measured"),
    ],
)
def test_the_target_names_its_tolerance_and_what_it_was_held_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, met: bool, line: str
) -> None:
    content = result(BETTER, targets=[{**TARGET, "asked": target, "met": met}])
    table.show(content)
    assert f"target {line}" in capsys.readouterr().out
    assert f"Target {line}." in html_of(content, tmp_path)


def test_each_of_several_targets_is_judged_by_itself(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = {"measured": None, "measured_share": None, "met": None, "reason": "no power sensor"}
    others = [
        {**TARGET, "quantity": "power_mw", "asked": "9W", "measured": 9600.0, "met": False},
        {**TARGET, "quantity": "energy_mj", "asked": "0.6x", **unknown},
        {**TARGET, "quantity": "macs", "asked": "0.5x", "measured_share": 0.49},
        {**TARGET, "quantity": "weight_bytes", "asked": "1MB", "measured": 9e5},
    ]
    table.show(result(BETTER, targets=[TARGET, *others]))
    printed = capsys.readouterr().out
    assert "target 9W of mean power NOT met (within 5 %): 9.600 W measured" in printed
    assert "target 0.6x of energy per image not judged: no power sensor" in printed
    assert "target 0.5x of MACs of the prunable layers met: 0.49x of the dense MACs" in printed
    assert "target 1MB of weights met: 0.900 MB counted" in printed


def test_images_that_were_skipped_stand_under_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"[bold]{i}.png: cut" for i in range(7)]
    line = f"7 images could not be read and took no part: {'; '.join(names[:5])}; ..."
    content = result(skipped_images=names)
    table.show(content)
    assert line in capsys.readouterr().out
    assert f"<li>{line}</li>" in html_of(content, tmp_path)
    one = table.notes(result(skipped_images=["a.png: cut"]))
    assert one == ["1 image could not be read and took no part: a.png: cut"]


def test_energy_that_one_side_lacks_gives_no_ratio_and_that_sides_reason() -> None:
    lost = {"energy_per_image_mj": None, "energy_reason": "the sensor went away"}
    content = result(lost)
    assert table.rows(content)[-1] == ("energy per image", "20.00 mJ", "-", "unavailable")
    assert table.notes(content) == ["energy is unavailable: the sensor went away"]


def test_the_curve_and_the_measured_engines_are_drawn_apart(tmp_path: Path) -> None:
    content = result(
        BETTER,
        accuracy_curve=[budget(1.0, 9.0, 0.91), budget(0.5, 4.5, 0.9), budget(0.4, 4.0, None)],
    )
    curve = _curve(content)
    assert curve is not None
    assert [(p["x"], p["name"]) for p in curve["points"]] == [(4.5, "0.50x"), (9.0, "1.00x")]
    assert [(p["x"], p["name"]) for p in curve["measured"]] == [(10.0, "dense"), (5.0, "sparse")]
    html = html_of(content, tmp_path)
    line = html.split('<polyline class="path" points="')[1].split('"')[0]
    assert line.split() == [f"{p['px']},{p['py']}" for p in curve["points"]]
    assert html.count('<rect class="mark"') == 2
    assert "measured by the engine, 2000 images" in html
    assert "accuracy by torch on 500 held-out images" in html


def test_one_budget_is_no_curve() -> None:
    assert _curve(result(accuracy_curve=[budget(0.5, 4.5, 0.9), budget(0.4, 4.0, None)])) is None


def test_labels_of_marks_that_lie_together_do_not_cover_each_other() -> None:
    curve = _curve(result(BETTER, accuracy_curve=[budget(0.5, 5.0, 0.9), budget(0.4, 9.9, 0.9001)]))
    assert curve is not None
    marks = [*curve["points"], *curve["measured"]]
    pairs = [(a, b) for i, a in enumerate(marks) for b in marks[:i]]
    assert all(abs(a["px"] - b["px"]) >= 42 or abs(a["ly"] - b["ly"]) >= 13 for a, b in pairs)
    assert all(0 < mark["ly"] < 230 for mark in marks)
