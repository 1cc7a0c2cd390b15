"""The verb `allocate`: from device_profile.json and sensitivity.json to allocation.json.

It needs neither torch nor the model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lpvit_edge import options
from lpvit_edge.budget import QUANTITIES

if TYPE_CHECKING:
    from rich.table import Table

    from lpvit_edge.records import Allocation, Choice, DeviceProfile

SCHEMA = "lpvit.allocate/1"
_WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(allocate)


def allocate(
    folder: Annotated[Path, typer.Argument(help="Run folder with profile and sensitivity.")],
    target_latency: options.TargetLatency = None,
    target_energy: options.TargetEnergy = None,
    max_power: options.MaxPower = None,
    target_macs: options.TargetMacs = None,
    target_weights: options.TargetWeights = None,
    allow_estimated_energy: options.AllowEstimated = False,
    profile: Annotated[
        Path | None, typer.Option(help="Device profile; by default the folder's.")
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="Sensitivity curves; by default the folder's.")
    ] = None,
    patterns: Annotated[
        str | None, typer.Option(help="Only these patterns, by comma: 64x1,64x16.")
    ] = None,
    allocator: options.Allocator = "milp",
    criterion: options.Criterion = "hessian",
    json: options.Json = False,
) -> None:
    """Choose a pattern and a sparsity for every layer within a budget: allocation.json.

    Targets may be combined; without any, --target-latency is 0.5x.

    Example: lpvit allocate runs/demo --target-latency 0.4x --max-power 12W --allocator slope
    """
    from lpvit_edge import files
    from lpvit_edge.allocate import allocate as choose
    from lpvit_edge.budget import limits, named
    from lpvit_edge.network_cost import dense_totals
    from lpvit_edge.records import DeviceProfile, Sensitivity

    options.one_of(allocator, ("milp", "slope", "uniform"), "--allocator")
    options.one_of(criterion, ("hessian", "taylor"), "--criterion")
    measured = files.load(DeviceProfile, profile or folder / "device_profile.json")
    curves = files.load(Sensitivity, sensitivity or folder / "sensitivity.json")
    targets = named(
        latency_ms=target_latency,
        energy_mj=target_energy,
        power_mw=max_power,
        macs=target_macs,
        weight_bytes=target_weights,
    )
    record = choose(
        measured,
        curves,
        budget=limits(targets or {"latency_ms": "0.5x"}, dense_totals(measured)),
        allocator=allocator,
        criterion=criterion,
        patterns=None if patterns is None else options.split(patterns),
        allow_estimated=allow_estimated_energy,
    )
    path = folder / "allocation.json"
    files.save(record, path)
    if json:
        options.print_json(record, schema=SCHEMA)
    else:
        _show(record, measured)
        print(f"wrote {path}")


def _show(record: "Allocation", measured: "DeviceProfile") -> None:
    from rich.console import Console

    from lpvit_edge.network_cost import dense_totals

    console = Console()
    console.print(_table(record), width=min(_WIDTH, console.width), highlight=False)
    for line in summary(record, dense_totals(measured)):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _table(record: "Allocation") -> "Table":
    from rich.table import Table

    table = Table(title=f"{record.model.name}, by {record.allocator}", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("pattern", "sparsity", "ms dense", "ms chosen", "distortion"):
        table.add_column(name, justify="right", no_wrap=True)
    for choice in record.choices:
        table.add_row(*_row(choice))
    return table


def _row(choice: "Choice") -> tuple[str, ...]:
    is_dense = choice.pattern == "dense"
    return (
        choice.layer,
        choice.pattern,
        "-" if is_dense else f"{100 * choice.sparsity:.0f} %",
        f"{choice.dense_latency_ms:.4f}",
        f"{choice.latency_ms:.4f}",
        "-" if is_dense else f"{choice.distortion:.2e}",
    )


def summary(record: "Allocation", dense: dict[str, float | None]) -> list[str]:
    """Predicted totals of the network beside the dense one, and which limits bind."""
    predicted: dict[str, Any] = {
        "latency_ms": record.predicted_latency_ms,
        "energy_mj": record.predicted_energy_mj,
        "power_mw": record.predicted_power_mw,
        "macs": record.macs,
        "weight_bytes": record.predicted_weight_bytes,
    }
    sparse = sum(choice.pattern != "dense" for choice in record.choices)
    lines = [f"{sparse} of {len(record.choices)} layers sparse, distortion {record.distortion:.3e}"]
    for key, value in predicted.items():
        if value is not None:
            lines.append(_line(key, value, dense.get(key), record))
    return lines


def _line(key: str, value: float, dense: float | None, record: "Allocation") -> str:
    quantity = QUANTITIES[key]
    beside = "" if not dense else f" (dense {quantity.text(dense)}, {value / dense:.2f}x)"
    limit = "" if key not in record.budget else f", limit {quantity.text(record.budget[key])}"
    bound = ", binds" if key in record.bound else ""
    estimated = (
        ", ESTIMATED"
        if key in ("energy_mj", "power_mw") and (record.energy_quality == "estimated")
        else ""
    )
    return f"predicted {quantity.word} {quantity.text(value)}{beside}{limit}{bound}{estimated}"
