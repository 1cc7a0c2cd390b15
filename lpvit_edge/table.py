"""The closing table: dense and sparse side by side, as it is printed and as it is reported."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lpvit_edge import floor
from lpvit_edge.targets import line

Row = tuple[str, str, str, str]  # what, dense, sparse, ratio or difference


def rows(result: dict[str, Any]) -> tuple[Row, ...]:
    """Rows of the table from the document of lpvit_edge.result."""
    dense, sparse = result["dense"], result["sparse"]
    return (
        _pair("latency, median", dense, sparse, "latency_ms", "{:.3f} ms", ("faster", "slower")),
        _pair("latency, p99", dense, sparse, "latency_p99_ms", "{:.3f} ms", ("faster", "slower")),
        (
            "throughput",
            f"{dense['throughput_per_s']:.1f} /s",
            f"{sparse['throughput_per_s']:.1f} /s",
            times(sparse["throughput_per_s"], dense["throughput_per_s"], "higher", "lower"),
        ),
        _accuracy(result),
        (
            "weights",
            _megabytes(dense["weight_bytes"]),
            _megabytes(sparse["weight_bytes"]),
            times(dense["weight_bytes"], sparse["weight_bytes"], "smaller", "larger"),
        ),
        _energy(dense, sparse),
    )


def times(numerator: float, denominator: float, better: str, worse: str) -> str:
    """A ratio in words that is never below one: "2.00x faster", "1.11x slower", "1.00x"."""
    if numerator <= 0.0 or denominator <= 0.0:
        return "-"
    ratio = numerator / denominator
    word = better if ratio > 1.0 else worse
    text = f"{max(ratio, 1.0 / ratio):.2f}x"
    return text if text == "1.00x" else f"{text} {word}"


def _pair(
    what: str,
    dense: dict[str, Any],
    sparse: dict[str, Any],
    key: str,
    form: str,
    words: tuple[str, str],
) -> Row:
    return (
        what,
        form.format(dense[key]),
        form.format(sparse[key]),
        times(dense[key], sparse[key], *words),
    )


def _accuracy(result: dict[str, Any]) -> Row:
    dense, sparse, drop = result["dense"], result["sparse"], result["accuracy_drop"]
    what = f"accuracy, {dense['images']} held-out"
    if drop is None:
        return what, "no labels", "no labels", f"{100 * result['agreement']:.2f} % agree"
    return (
        what,
        f"{100 * dense['accuracy']:.2f} %",
        f"{100 * sparse['accuracy']:.2f} %",
        points(-drop),
    )


def points(change: float) -> str:
    """A change of a fraction in percentage points, signed unless it rounds to nothing."""
    text = f"{100 * change:+.2f}"
    return f"{'0.00' if text[1:] == '0.00' else text} points"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _energy(dense: dict[str, Any], sparse: dict[str, Any]) -> Row:
    a, b = dense["energy_per_image_mj"], sparse["energy_per_image_mj"]
    texts = ["-" if value is None else f"{value:.2f} mJ" for value in (a, b)]
    if a is None or b is None:
        return "energy per image", texts[0], texts[1], "unavailable"
    how = f"{_either(dense, sparse, 'energy_quality')}, {_either(dense, sparse, 'energy_scope')}"
    return "energy per image", texts[0], texts[1], f"{times(a, b, 'less', 'more')} ({how})"


def _either(dense: dict[str, Any], sparse: dict[str, Any], key: str) -> str:
    return " / ".join(dict.fromkeys(str(side[key]) for side in (dense, sparse)))


def targets(result: dict[str, Any]) -> list[str]:
    """Whether each target is met, against what it was compared with, a line each."""
    return [line(target) for target in result["targets"]]


def prediction(result: dict[str, Any]) -> str:
    """Predicted against measured latency, in one line."""
    return (
        f"predicted {result['predicted_latency_ms']:.3f} ms, measured "
        f"{result['sparse']['latency_ms']:.3f} ms ({100 * result['prediction_error']:+.1f} %)"
    )


def show(result: dict[str, Any]) -> None:
    """Print the table to stdout."""
    console = Console()
    table = Table(title=f"{result['model']['name']} on {result['engine']}", title_justify="left")
    for name in ("", "dense", "sparse", ""):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    console.print("; ".join([*targets(result), prediction(result)]), soft_wrap=True)
    if result["accuracy_floor"] is not None:
        console.print(floor.line(result["accuracy_floor"]), soft_wrap=True)
    for note in notes(result):
        console.print(note, soft_wrap=True, style="yellow", markup=False)


def notes(result: dict[str, Any]) -> list[str]:
    """Lines under the table: doubts, why there is no energy, which images were left out."""
    lines = [
        f"{what} may be unstable because {reason}"
        for what, reasons in doubts(result).items()
        for reason in reasons
    ]
    return [*lines, *_energy_notes(result), *_skipped(result["skipped_images"])]


def _energy_notes(result: dict[str, Any]) -> list[str]:
    by_side = {
        name: (result[name]["energy_per_image_mj"], result[name]["energy_reason"])
        for name in ("dense", "sparse")
    }
    lines = {
        reason: "energy is unavailable" if value is None else "energy may be off"
        for value, reason in by_side.values()
        if reason
    }
    return [f"{what}: {reason}" for reason, what in lines.items()]


def _skipped(images: Sequence[str]) -> list[str]:
    if not images:
        return []
    named = "; ".join(images[:5]) + ("; ..." if len(images) > 5 else "")
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    return [f"{count} could not be read and took no part: {named}"]


def doubts(result: dict[str, Any]) -> dict[str, list[str]]:
    """Why a number may not be trusted, by what it is a number of."""
    return {
        "the dense latency": result["dense"]["latency_reasons"],
        "the sparse latency": result["sparse"]["latency_reasons"],
        "the device profile": result["profile_reasons"],
    }
