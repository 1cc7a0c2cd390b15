"""The verb `finetune`: train the remaining weights of a pruned model, its zeros held."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lpvit_edge import options

if TYPE_CHECKING:
    from lpvit_edge.recipe import FinetuneLog

SCHEMA = "lpvit.finetune/1"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(finetune)


def finetune(
    model: options.Model,
    out: options.Out = Path("runs/optimize"),
    weights: options.Weights = None,
    train: Annotated[
        Path | None,
        typer.Option(help="Folder of training images; by default all calibration images."),
    ] = None,
    calibration: options.Calibration = None,
    heldout: options.Heldout = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 3,
    batch: Annotated[
        int, typer.Option(min=1, help="Images of one step, of all processes together.")
    ] = 32,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of AdamW, at its peak.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Of AdamW.")] = 0.01,
    soft: Annotated[
        float, typer.Option(min=0.0, help="Weight of the dense model's probabilities.")
    ] = 1.0,
    hard: Annotated[float, typer.Option(min=0.0, help="Weight of the dense model's answer.")] = 0.5,
    labels: Annotated[
        float, typer.Option(min=0.0, help="Weight of the labels, where images have any.")
    ] = 0.5,
    temperature: Annotated[float, typer.Option(min=0.1, help="Of the soft part.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the images.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again although an unfinished run is there.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Distil the dense model into the pruned one: model.safetensors, finetune.json.

    Works without labels too. Over several processes: accelerate launch -m lpvit_edge finetune ...

    Example: lpvit finetune my_model.toml --train images/train --epochs 10 --out runs/mine
    """
    from lpvit_edge import files
    from lpvit_edge import finetune as tuning
    from lpvit_edge.images import scan_folder
    from lpvit_edge.job import class_order
    from lpvit_edge.records import Allocation

    allocation = files.load(Allocation, out / "allocation.json")
    every = sys.maxsize  # all calibration images
    job = options.job(model, out, weights, calibration, heldout, every, "openvino", 0)
    images = job.calibration if train is None else scan_folder(train, labels=class_order(job))
    plan = tuning.Plan(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        soft=soft,
        hard=hard,
        labels=labels,
        temperature=temperature,
        seed=seed,
    )
    record = tuning.finetune(job, allocation, images, plan, resume=resume, overwrite=overwrite)
    if json:
        options.print_json(record, schema=SCHEMA)
        return
    print(f"{out / 'model.safetensors'}: {_line(record)}; next: lpvit build, lpvit check")


def _line(record: "FinetuneLog") -> str:
    accuracy = "no labels"
    if record.accuracy_before is not None and record.accuracy_after is not None:
        accuracy = (
            f"accuracy {100 * record.accuracy_before:.2f} % before, "
            f"{100 * record.accuracy_after:.2f} % after, {record.heldout_images} held-out images"
        )
    return (
        f"{record.recipe.epochs} epochs over {record.images} images, "
        f"{record.masked_weights} zeros held, {accuracy}"
    )
