"""The command line: parse, load, one library call, save, say one line.

Imports of stages live inside the commands, so that `lpvit --help` works on any machine.
"""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lpvit_edge import (
    __version__,
    allocate_cli,
    dashboard_cli,
    distributed,
    finetune_cli,
    install_cli,
    options,
    power_cli,
    profile_cli,
    prune_cli,
    run_cli,
)
from lpvit_edge.errors import (
    AccuracyFloorError,
    BudgetNotMetError,
    LpvitEdgeError,
    UnknownOptionError,
)

app = typer.Typer(
    name="lpvit",
    help="Measure this device, prune a Vision Transformer for it, build an engine, prove the gain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of every verb."""


@app.command()
def optimize(
    model: options.Model,
    target_latency: options.TargetLatency = None,
    target_energy: options.TargetEnergy = None,
    max_power: options.MaxPower = None,
    target_macs: options.TargetMacs = None,
    target_weights: options.TargetWeights = None,
    allow_estimated_energy: options.AllowEstimated = False,
    accuracy_floor: options.AccuracyFloor = None,
    max_drop: options.MaxDrop = None,
    out: options.Out = Path("runs/optimize"),
    weights: options.Weights = None,
    calibration: options.Calibration = None,
    heldout: options.Heldout = None,
    images: options.Images = options.IMAGES,
    engine: options.Engine = "openvino",
    threads: options.Threads = 0,
    patterns: options.Patterns = options.BY_ENGINE,
    allocator: options.Allocator = "milp",
    criterion: options.Criterion = "hessian",
    rotate: options.Rotate = None,
    device: options.Device = "cpu",
    curve: Annotated[bool, typer.Option(help="Also show accuracy over several budgets.")] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again in a folder that holds a run.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Walk the whole way: from a trained model to a faster engine on this machine, proven.

    Targets may be combined. With an accuracy floor alone it goes as far as the floor allows, with
    both it goes back from the targets where the floor would break; with neither,
    --target-latency is 0.5x.

    Example: lpvit optimize examples/factory_line/model.toml --target-latency 0.5x --out runs/demo
    """
    distributed.refuse_many("optimize")
    from lpvit_edge import optimize as main_job
    from lpvit_edge import run_folder
    from lpvit_edge.table import show

    job = options.job(
        model, out, weights, calibration, heldout, images, engine, threads, patterns, device
    )
    goal = run_folder.Goal(
        target_latency=target_latency,
        target_energy=target_energy,
        max_power=max_power,
        target_macs=target_macs,
        target_weights=target_weights,
        allow_estimated_energy=allow_estimated_energy,
        accuracy_floor=accuracy_floor,
        max_drop=max_drop,
        allocator=options.one_of(allocator, ("milp", "slope", "uniform"), "--allocator"),
        criterion=options.one_of(criterion, ("hessian", "taylor"), "--criterion"),
        rotate=rotate,
        curve=curve,
    ).or_default()
    run_folder.start(job, goal, resume=resume, overwrite=overwrite)
    result = main_job.optimize(job, goal)
    if json:
        sys.stdout.write(job.path("optimize.json").read_text(encoding="utf-8"))
    else:
        show(result)
        print(f"report: {result['report']}")
    code = _exit_code(result)
    if code:
        raise typer.Exit(code)


def _exit_code(result: dict[str, Any]) -> int:
    """5 where the accuracy floor is broken, 4 where a target is missed, see lpvit_edge.errors."""
    floor = result["accuracy_floor"]
    if floor is not None and not floor["held"]:
        return AccuracyFloorError.exit_code
    return 0 if result["target_met"] else BudgetNotMetError.exit_code


@app.command()
def sensitivity(
    model: options.Model,
    out: options.Out = Path("runs/optimize"),
    weights: options.Weights = None,
    calibration: options.Calibration = None,
    heldout: options.Heldout = None,
    images: options.Images = options.IMAGES,
    engine: options.Engine = "openvino",
    patterns: options.Patterns = options.BY_ENGINE,
    rotate: options.Rotate = None,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Measure how much the output suffers from pruning each layer: sensitivity.json.

    Example: lpvit sensitivity examples/factory_line/model.toml --images 256 --out runs/demo
    """
    from lpvit_edge import steps

    job = options.job(
        model, out, weights, calibration, heldout, images, engine, 0, patterns, device
    )
    record = steps.sensitivity(job, rotate=rotate)
    if json:
        options.print_json(record, schema="lpvit.sensitivity/1")
        return
    of = "the model as it is" if record.basis_sha256 is None else "the rotated model"
    path, count = job.path("sensitivity.json"), len(record.curves)
    print(f"{path}: {count} curves of {of}, {record.images} images")


@app.command()
def build(
    model: options.Model,
    out: options.Out = Path("runs/optimize"),
    weights: options.Weights = None,
    calibration: options.Calibration = None,
    heldout: options.Heldout = None,
    engine: options.Engine = "openvino",
    threads: options.Threads = 0,
    precision: options.Precision = "default",
    python_free: Annotated[
        bool,
        typer.Option(
            "--python-free", help="TensorRT 10.9+: a plan that trtexec and C++ can load, too."
        ),
    ] = False,
) -> None:
    """Export model.onnx, hold it against torch, compile it here: export.json, manifest.json.

    model.onnx itself stays float32. `lpvit check` and `lpvit run` take the precision built here.
    TensorRT's int8 is calibrated on 256 of the calibration images: model.int8.json. Where there is
    no torch, give TensorRT the exported file itself: lpvit build model.onnx --engine tensorrt.

    Example: lpvit build examples/factory_line/model.toml --out runs/demo --precision bf16
    """
    distributed.refuse_many("build")
    if Path(model).suffix == ".onnx":
        from lpvit_edge.tensorrt_build import build_file

        file = Path(model)
        print(build_file(file, engine=engine, precision=precision, python_free=python_free))
        return
    from lpvit_edge import files, steps
    from lpvit_edge.records import Allocation

    allocation = files.load(Allocation, out / "allocation.json")
    images = options.IMAGES
    job = options.job(model, out, weights, calibration, heldout, images, engine, threads)
    if python_free and engine != "tensorrt":
        raise UnknownOptionError(f"--python-free is for --engine tensorrt, not {engine}")
    log = steps.export(job, allocation, precision=precision, python_free=python_free)
    steps.build(job, precision=precision, python_free=python_free)
    print(f"{job.path('model.onnx')}: differs from torch by {log.engine_error:.1e} at most")


@app.command()
def check(
    model: options.Model,
    out: options.Out = Path("runs/optimize"),
    weights: options.Weights = None,
    calibration: options.Calibration = None,
    heldout: options.Heldout = None,
    engine: options.Engine = "openvino",
    threads: options.Threads = 0,
    window: options.Window = "default",
) -> None:
    """Measure dense.onnx and model.onnx side by side on this device: check.json.

    Example: lpvit check examples/factory_line/model.toml --out runs/demo --window reference
    """
    distributed.refuse_many("check")
    from lpvit_edge import files, steps
    from lpvit_edge.records import Allocation

    allocation = files.load(Allocation, out / "allocation.json")
    images = options.IMAGES  # of the drift reference
    job = options.job(model, out, weights, calibration, heldout, images, engine, threads)
    record = steps.check(job, allocation, seconds=options.window_s(window))
    drop = "no labels" if record.accuracy_drop is None else f"{100 * record.accuracy_drop:.2f}"
    print(f"{job.path('check.json')}: {record.speedup:.2f}x faster, accuracy drop {drop} points")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Run folder with optimize.json.")],
) -> None:
    """Write report.html again from optimize.json.

    Example: lpvit report runs/demo
    """
    from lpvit_edge.report import write_report
    from lpvit_edge.result import load_document

    write_report(load_document(folder / "optimize.json"), folder / "report.html")
    print(folder / "report.html")


profile_cli.register(app)
allocate_cli.register(app)
prune_cli.register(app)
finetune_cli.register(app)
power_cli.register(app)
install_cli.register(app)
run_cli.register(app)
dashboard_cli.register(app)


def main() -> int:
    """Run one command. Exit codes: see lpvit_edge.errors; 0 done, 2 wrong usage."""
    if not distributed.is_main():
        sys.stdout = io.StringIO()
    try:
        app()
    except LpvitEdgeError as error:
        print(f"lpvit: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a folder without write permission
        print(f"lpvit: {error}. What was complete before is still there", file=sys.stderr)
        return 1
    finally:
        distributed.leave()
    return 0
