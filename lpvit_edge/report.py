"""report.html: one self-contained file that a manager and an engineer can both read."""

from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from lpvit_edge import table
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
        prediction=table.prediction(result),
        doubts=table.doubts(result),
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
    elif drop <= 0:
        cost = "no accuracy lost"
    else:
        cost = f"{100 * drop:.2f} points of accuracy lost"
    return f"{result['speedup']:.2f}x faster on this machine, {cost}"


def _bars(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometry of one pair of bars a layer, dense above sparse."""
    longest = max(layer["dense_latency_ms"] for layer in layers) or 1.0
    scale = _BAR_WIDTH / longest
    return [
        {
            "y": index * _ROW_HEIGHT + 2,
            "name": layer["layer"],
            "dense_width": round(layer["dense_latency_ms"] * scale, 1),
            "sparse_width": round(layer["latency_ms"] * scale, 1),
            "form": "dense"
            if layer["pattern"] == "dense"
            else f"{layer['pattern']} {100 * layer['sparsity']:.0f} %",
            "times": " → ".join(
                f"{1000 * layer[key]:.0f}" for key in ("dense_latency_ms", "latency_ms")
            )
            + " µs",
        }
        for index, layer in enumerate(layers)
    ]


def _curve(result: dict[str, Any]) -> dict[str, Any] | None:
    """Points of the accuracy-latency picture, 560 x 260, or None when there are too few."""
    points = [p for p in result["accuracy_curve"] if p["accuracy"] is not None]
    if len(points) < 2 or result["dense"]["accuracy"] is None:
        return None
    end = {"x": result["dense"]["latency_ms"], "y": result["dense"]["accuracy"], "name": "dense"}
    all_points = [
        {
            "x": p["predicted_latency_ms"],
            "y": p["accuracy"],
            "name": f"{p['target']:.2f}x",
        }
        for p in points
    ]
    everything = [*all_points, end]
    x_max = 1.08 * max(p["x"] for p in everything)
    low = min(p["y"] for p in everything)
    high = max(p["y"] for p in everything)
    margin = max(0.005, 0.15 * (high - low))
    y_min, y_max = max(0.0, low - margin), min(1.0, high + margin)
    for p in everything:
        p["px"] = round(60 + 480 * p["x"] / x_max, 1)
        p["py"] = round(20 + 200 * (y_max - p["y"]) / (y_max - y_min), 1)
    ticks = [round(y_min + (y_max - y_min) * part / 4, 4) for part in range(5)]
    return {
        "points": sorted(everything, key=lambda p: p["x"]),
        "images": points[0]["images"],
        "y_ticks": [(f"{100 * t:.1f} %", round(220 - 50 * i, 1)) for i, t in enumerate(ticks)],
        "x_ticks": [(f"{x_max * part / 4:.1f} ms", round(60 + 120 * part, 1)) for part in range(5)],
    }


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
