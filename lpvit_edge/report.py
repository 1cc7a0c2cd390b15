"""report.html: one self-contained file that a manager and an engineer can both read."""

from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from lpvit_edge import floor, table
from lpvit_edge.deps import require
from lpvit_edge.files import write_atomic

_BAR_WIDTH, _ROW_HEIGHT, _LABEL_WIDTH = 420, 26, 210


def write_report(result: dict[str, Any], path: Path) -> None:
    """Render the document of lpvit_edge.result as HTML with inline pictures."""
    jinja2 = require("jinja2")
    source = package_files("lpvit_edge").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(source).render(
        result=result,
        rows=table.rows(result),
        targets=table.targets(result),
        prediction=table.prediction(result),
        floor_line=None
        if result["accuracy_floor"] is None
        else floor.line(result["accuracy_floor"]),
        notes=table.notes(result),
        headline=_headline(result),
        bars=_bars(result["layers"]),
        bar_size=(_LABEL_WIDTH + _BAR_WIDTH + 190, _ROW_HEIGHT * len(result["layers"]) + 4),
        label_width=_LABEL_WIDTH,
        curve=_curve(result),
        device=_device_rows(result["device"]),
    )
    write_atomic(path, html.encode())


def _headline(result: dict[str, Any]) -> str:
    drop = result["accuracy_drop"]
    if drop is None:
        cost = f"{100 * result['agreement']:.1f} % of answers unchanged"
    elif table.points(drop) == "0.00 points" or drop < 0:
        cost = "no accuracy lost"
    else:
        cost = f"{100 * drop:.2f} points of accuracy lost"
    speed = table.times(result["speedup"], 1.0, "faster", "slower")
    speed = "As fast as the dense engine" if speed == "1.00x" else speed
    return f"{speed} on this machine, {cost}"


def _bars(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometry of one pair of bars a layer, dense above sparse."""
    keys = ("dense_latency_ms", "latency_ms")
    longest = max(layer[key] for layer in layers for key in keys) or 1.0
    scale = _BAR_WIDTH / longest
    return [
        {
            "y": index * _ROW_HEIGHT + 2,
            "name": layer["layer"],
            "dense_width": round(layer["dense_latency_ms"] * scale, 1),
            "sparse_width": round(layer["latency_ms"] * scale, 1),
            "width": round(max(layer["dense_latency_ms"], layer["latency_ms"]) * scale, 1),
            "form": "dense"
            if layer["pattern"] == "dense"
            else f"{layer['pattern']} {100 * layer['sparsity']:.0f} %",
            "times": " → ".join(f"{1000 * layer[key]:.0f}" for key in keys) + " µs",
        }
        for index, layer in enumerate(layers)
    ]


def _curve(result: dict[str, Any]) -> dict[str, Any] | None:
    """Geometry of the accuracy-latency picture, 560 x 260, or None when there are too few points.

    The curve's points (predicted latency, accuracy by torch) are one line; what the engines
    measured are marks of their own, because neither latency nor images are the same.
    """
    budgets = [
        {"x": p["predicted_latency_ms"], "y": p["accuracy"], "name": f"{p['target']:.2f}x"}
        for p in result["accuracy_curve"]
        if p["accuracy"] is not None
    ]
    if len(budgets) < 2:
        return None
    measured = [
        {"x": result[name]["latency_ms"], "y": result[name]["accuracy"], "name": name}
        for name in ("dense", "sparse")
        if result[name]["accuracy"] is not None
    ]
    everything = [*measured, *budgets]
    x_max = 1.08 * max(p["x"] for p in everything)
    y_min, y_max = _y_range([p["y"] for p in everything])
    for p in everything:
        p["px"] = round(60 + 480 * p["x"] / x_max, 1)
        p["py"] = round(20 + 200 * (y_max - p["y"]) / (y_max - y_min), 1)
    _place_labels(everything)
    digits = 1 if y_max - y_min > 0.008 else 2
    parts = [part / 4 for part in range(5)]
    return {
        "points": sorted(budgets, key=lambda p: p["x"]),
        "measured": measured,
        "images": next(p["images"] for p in result["accuracy_curve"] if p["accuracy"] is not None),
        "measured_images": result["dense"]["images"],
        "y_ticks": [
            (f"{100 * (y_min + (y_max - y_min) * part):.{digits}f} %", round(220 - 200 * part, 1))
            for part in parts
        ],
        "x_ticks": [(f"{x_max * part:.1f} ms", round(60 + 480 * part, 1)) for part in parts],
    }


def _y_range(accuracies: list[float]) -> tuple[float, float]:
    low, high = min(accuracies), max(accuracies)
    margin = max(0.005, 0.15 * (high - low))
    return max(0.0, low - margin), min(1.0, high + margin)


def _place_labels(marks: list[dict[str, Any]]) -> None:
    """Give each mark the label place (above, below, higher, lower) that touches the fewest others.

    A label is about 40 x 12 with its baseline at (lx, ly), and a mark 12 x 12.
    """
    labels: list[tuple[float, float]] = []

    def touched(mark: dict[str, Any], offset: int) -> int:
        x, y = mark["px"], mark["py"] + offset
        by_labels = sum(abs(x - lx) < 42 and abs(y - ly) < 13 for lx, ly in labels)
        by_marks = sum(abs(x - m["px"]) < 26 and abs(y - 4 - m["py"]) < 11 for m in marks)
        return int(by_labels + by_marks + 10 * (not 10 <= y <= 218))

    for mark in marks:
        offset = min((-10, 20, -24, 34), key=lambda step: touched(mark, step))
        mark["ly"] = round(mark["py"] + offset, 1)
        labels.append((mark["px"], mark["ly"]))


def _device_rows(device: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known about the device; nested parts in one line each, unknown ones left out."""
    return [
        (name.replace("_", " "), _text(value))
        for name, value in device.items()
        if value not in (None, "", [], {}, ())
    ]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)
