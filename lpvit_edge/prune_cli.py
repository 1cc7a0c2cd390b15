"""The verb `prune`: the weights of an allocation, repaired and, if asked for, matched."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lpvit_edge import options
from lpvit_edge.errors import UnknownOptionError

if TYPE_CHECKING:
    from lpvit_edge.matching import MatchLog
    from lpvit_edge.records import PruneLog

SCHEMA = "lpvit.prune/1"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(prune)


def prune(
    model: options.Model,
    out: options.Out = Path("runs/optimize"),
    weights: options.Weights = None,
    calibration: options.Calibration = None,
    heldout: options.Heldout = None,
    images: options.Images = 256,
    reorder: Annotated[
        bool,
        typer.Option(
            "--reorder", help="First order neurons and head channels to suit the patterns."
        ),
    ] = False,
    weigh_outputs: Annotated[
        bool,
        typer.Option(
            "--weigh-outputs", help="Choose blocks by what the loss feels of a layer's outputs."
        ),
    ] = False,
    match_outputs: Annotated[
        bool,
        typer.Option(
            "--match-outputs",
            help="Then move norms and biases towards the dense answers: minutes, no labels.",
        ),
    ] = False,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Prune and repair as allocation.json says: model.safetensors, prune.json.

    Example: lpvit prune examples/factory_line/model.toml --out runs/demo --match-outputs
    """
    if reorder and weigh_outputs:
        raise UnknownOptionError(
            "--reorder and --weigh-outputs: outputs are weighed in the order they have; give one "
            "of them"
        )
    from lpvit_edge import files, prune_step
    from lpvit_edge.matching import Matching, MatchLog
    from lpvit_edge.prune import Settings
    from lpvit_edge.records import Allocation

    allocation = files.load(Allocation, out / "allocation.json")
    job = options.job(
        model, out, weights, calibration, heldout, images, "openvino", 0, device=device
    )
    record = prune_step.prune(
        job,
        allocation,
        settings=Settings(permute=reorder),
        weigh_outputs=weigh_outputs,
        matching=Matching() if match_outputs else None,
    )
    if json:
        options.print_json(record, schema=SCHEMA)
        return
    _show(record)
    weights = job.path("model.safetensors")
    print(f"{weights}: {len(record.layers)} layers pruned and repaired ({record.method})")
    if match_outputs:
        print(_matched(files.load(MatchLog, job.path("matching.json"))))


def _show(record: "PruneLog") -> None:
    """One line a layer: what was asked of it and how well it could be repaired."""
    from rich.console import Console
    from rich.table import Table

    table = Table("layer", "pattern", "sparsity", "error", "damping", "seconds", box=None)
    for layer in record.layers:
        share = layer.damping_share
        table.add_row(
            layer.layer,
            layer.pattern,
            f"{layer.sparsity:.1%}",
            f"{layer.relative_error:.2%}",
            "-" if share is None else f"{share:.2%}",
            f"{layer.seconds:.1f}",
        )
    Console().print(table)


def _matched(found: "MatchLog") -> str:
    return (
        f"outputs matched: loss on {found.images_apart} images kept apart {found.loss_before:.4f} "
        f"before, {found.loss_after:.4f} after {found.kept_step} of {found.steps} steps"
    )
