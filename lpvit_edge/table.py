"""The closing table: dense and sparse side by side, as it is printed and as it is reported."""

from typing import Any

from rich.console import Console
from rich.table import Table

Row = tuple[str, str, str, str]  # what, dense, sparse, ratio or difference


def rows(result: dict[str, Any]) -> tuple[Row, ...]:
    """Rows of the table from the document of lpvit_edge.result."""
    dense, sparse = result["dense"], result["sparse"]
    return (
        _pair("latency, median", dense, sparse, "latency_ms", "{:.3f} ms", "faster"),
        _pair("latency, p99", dense, sparse, "latency_p99_ms", "{:.3f} ms", "faster"),
        _pair("throughput", dense, sparse, "throughput_per_s", "{:.1f} /s", "higher"),
        _accuracy(result),
        (
            "weights",
            _megabytes(dense["weight_bytes"]),
            _megabytes(sparse["weight_bytes"]),
            f"{dense['weight_bytes'] / sparse['weight_bytes']:.2f}x smaller",
        ),
        _energy(dense, sparse),
    )


def _pair(
    what: str, dense: dict[str, Any], sparse: dict[str, Any], key: str, form: str, word: str
) -> Row:
    ratio = dense[key] / sparse[key]
    ratio = 1.0 / ratio if word == "higher" else ratio
    return what, form.format(dense[key]), form.format(sparse[key]), f"{ratio:.2f}x {word}"


def _accuracy(result: dict[str, Any]) -> Row:
    dense, sparse, drop = result["dense"], result["sparse"], result["accuracy_drop"]
    what = f"accuracy, {dense['images']} held-out"
    if drop is None:
        return what, "no labels", "no labels", f"{100 * result['agreement']:.2f} % agree"
    return (
        what,
        f"{100 * dense['accuracy']:.2f} %",
        f"{100 * sparse['accuracy']:.2f} %",
        f"{-100 * drop:+.2f} points",
    )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _energy(dense: dict[str, Any], sparse: dict[str, Any]) -> Row:
    a, b = dense["energy_per_image_mj"], sparse["energy_per_image_mj"]
    if a is None or b is None:
        reason = dense["energy_reason"] or sparse["energy_reason"]
        return "energy per image", "-", "-", f"unavailable: {reason}"
    return "energy per image", f"{a:.2f} mJ", f"{b:.2f} mJ", f"{a / b:.2f}x less"


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
    met = "met" if result["target_met"] else "NOT met"
    console.print(
        f"speedup {result['speedup']:.2f}x   target {result['target_latency_ms']:.3f} ms {met}   "
        + prediction(result),
        soft_wrap=True,
    )
    for what, reasons in doubts(result).items():
        for reason in reasons:
            console.print(
                f"{what} may be unstable because {reason}", soft_wrap=True, style="yellow"
            )


def doubts(result: dict[str, Any]) -> dict[str, list[str]]:
    """Why a number may not be trusted, by what it is a number of."""
    return {
        "the dense latency": result["dense"]["latency_reasons"],
        "the sparse latency": result["sparse"]["latency_reasons"],
        "the device profile": result["profile_reasons"],
    }
