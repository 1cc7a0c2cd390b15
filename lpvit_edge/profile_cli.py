"""The verb `profile`: what every form of every layer costs on this device."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lpvit_edge import distributed, options

if TYPE_CHECKING:
    from lpvit_edge.records import DeviceProfile

SCHEMA = "lpvit.profile/1"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(profile)


def profile(
    model: options.Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The run folder, or a .json file.")
    ] = Path("runs/optimize"),
    weights: options.Weights = None,
    engine: options.Engine = "openvino",
    threads: options.Threads = 0,
    patterns: options.Patterns = options.BY_ENGINE,
    budget: Annotated[
        str | None, typer.Option(help="Time for the layer forms: 90s, 5m. Largest layers first.")
    ] = None,
    tdp_w: Annotated[
        float | None,
        typer.Option(
            help="Processor's TDP in watts: estimate energies where no sensor is; not with "
            "TensorRT, which works on the GPU.",
            min=1.0,
            max=1999.0,
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Measure what every form of every layer costs on this device: device_profile.json.

    Example: lpvit profile examples/factory_line/model.toml --budget 5m --out device_profile.json
    """
    distributed.refuse_many("profile")
    from lpvit_edge.budget import seconds_of
    from lpvit_edge.device_profile import profile_device

    path = out if out.suffix == ".json" else out / "device_profile.json"
    job = options.job_without_images(model, path.parent, weights, engine, threads, patterns)
    seconds = None if budget is None else seconds_of(budget)
    record = profile_device(job, seconds=seconds, path=path, tdp_w=tdp_w)
    if json:
        options.print_json(record, schema=SCHEMA)
    else:
        _print_lines(path, record)


def _print_lines(path: Path, record: "DeviceProfile") -> None:
    print(
        f"{path}: {len(record.gemms)} forms, dense {record.dense.median_ms:.3f} ms, sum of parts "
        f"{record.sum_over_measured:.2f} of it, energy {record.power.quality}"
    )
    if record.power.reason is not None:
        print(f"energy: {record.power.reason}")
    if record.mixed_error is not None:
        print(f"a network of mixed forms was predicted {record.mixed_error:+.1%} off")
    for reason in record.reasons:
        print(f"may not be trusted because {reason}")
