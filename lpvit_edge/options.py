"""Options that several verbs share, and what they are turned into."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from lpvit_edge.errors import UnknownOptionError

if TYPE_CHECKING:
    from lpvit_edge.job import Job
    from lpvit_edge.records import Record

Model: TypeAlias = Annotated[
    str,
    typer.Argument(help="A model.toml, a timm name, or package.module:function."),
]
Weights: TypeAlias = Annotated[
    Path | None, typer.Option(help="Weights (.safetensors or .pt); overrides the TOML file.")
]
Calibration: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder of calibration images, a subfolder per class.")
]
Heldout: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder of held-out images, a subfolder per class.")
]
IMAGES = 256  # of calibration, unless told otherwise
Images: TypeAlias = Annotated[int, typer.Option(min=1, help="How many calibration images to use.")]
Out: TypeAlias = Annotated[Path, typer.Option("--out", "-o", help="The run folder.")]
Engine: TypeAlias = Annotated[str, typer.Option(help="The engine that runs the model.")]
Threads: TypeAlias = Annotated[
    int, typer.Option(min=0, help="Threads of the engine; 0: all that this process may use.")
]
Precision: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Precision that the engine runs in: default, bf16 (openvino), fp16 (tensorrt) or int8."
    ),
]
Patterns: TypeAlias = Annotated[
    str,
    typer.Option(help="Patterns, output rows x input columns, by comma; menu: the engine's own."),
]
TargetLatency: TypeAlias = Annotated[
    str | None, typer.Option(help="Latency to reach: 0.5x of the dense engine, or 12ms.")
]
TargetEnergy: TypeAlias = Annotated[
    str | None, typer.Option(help="Energy per image to reach: 0.6x of the dense one, or 40mJ.")
]
MaxPower: TypeAlias = Annotated[
    str | None, typer.Option(help="Mean power that must not be exceeded while it runs: 12W.")
]
TargetMacs: TypeAlias = Annotated[
    str | None, typer.Option(help="MACs of the prunable layers to reach: 0.5x, or 900M.")
]
TargetWeights: TypeAlias = Annotated[
    str | None, typer.Option(help="Size of all weights to reach: 0.5x, or 20MB.")
]
AllowEstimated: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-estimated-energy",
        help="Limit energy or power although the profile's energies are estimated.",
    ),
]
AccuracyFloor: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Accuracy that must hold with 95 % confidence, a fraction: 0.95."),
]
MaxDrop: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Points of accuracy that may be lost, with 95 % confidence: 1.0."),
]
Allocator: TypeAlias = Annotated[str, typer.Option(help="milp (exact), slope (LPViT), uniform.")]
Criterion: TypeAlias = Annotated[
    str, typer.Option(help="hessian (after repair) or taylor (LPViT, mask only).")
]
Rotate: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--rotate/--no-rotate",
        help="Rotate the residual streams first, so that blocks cost less; by default where the "
        "model allows it and 2:4 is no pattern.",
        show_default=False,
    ),
]
Device: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Where torch takes curves and prunes: cpu, cuda, or cuda:1; engines have their own."
    ),
]
Window: TypeAlias = Annotated[
    str, typer.Option(help="Length of each loop: quick (3 s), default (10 s) or reference (60 s).")
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")
]

# Which patterns a device is asked for belongs to the device. On a processor one input column by 64
# output rows runs as fast as 64 by 64 and costs almost no accuracy; GPU kernels need 16 columns.
PATTERN_MENUS = {
    "openvino": ("64x1", "32x4", "64x16", "32x32"),
    "fake": ("64x1", "64x16"),
    "tensorrt": ("2:4", "64x16", "64x32", "64x64"),
}
BY_ENGINE = "menu"  # what --patterns is when the engine's own menu is meant


def job(
    model: str,
    out: Path,
    weights: Path | None,
    calibration: Path | None,
    heldout: Path | None,
    images: int,
    engine: str,
    threads: int,
    patterns: str | None = None,
    device: str = "cpu",
) -> "Job":
    """Load the model and find its images, as the options say.

    No patterns: a step after the allocation, which names every layer's pattern itself.
    """
    from lpvit_edge.deps import require
    from lpvit_edge.job import available_threads, prepare

    require("torch")
    from lpvit_edge.models import load_model
    from lpvit_edge.torch_device import resolved

    device = resolved(device)
    loaded = load_model(model, weights=weights)
    return prepare(
        loaded,
        out,
        calibration=calibration or loaded.calibration,
        heldout=heldout or loaded.heldout,
        images=images,
        engine=engine,
        threads=threads or available_threads(),
        patterns=() if patterns is None else _patterns(patterns, engine),
        device=device,
    )


def job_without_images(
    model: str, folder: Path, weights: Path | None, engine: str, threads: int, patterns: str
) -> "Job":
    """Load the model alone: measuring the device needs no images."""
    from lpvit_edge.deps import require
    from lpvit_edge.job import available_threads, prepare_without_images

    require("torch")
    from lpvit_edge.models import load_model

    return prepare_without_images(
        load_model(model, weights=weights),
        folder,
        engine=engine,
        threads=threads or available_threads(),
        patterns=_patterns(patterns, engine),
    )


def _patterns(text: str, engine: str) -> tuple[str, ...]:
    if text == BY_ENGINE:
        return PATTERN_MENUS.get(engine, PATTERN_MENUS["openvino"])
    return split(text)


def one_of(value: str, allowed: tuple[str, ...], option: str) -> str:
    """The value, or UnknownOptionError naming what is allowed."""
    if value not in allowed:
        raise UnknownOptionError(f"{option} {value!r}; choose one of {', '.join(allowed)}")
    return value


def split(text: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def window_s(name: str) -> float:
    """Seconds of one loop of a measurement by its name."""
    from lpvit_profilers.energy import DEFAULT_S, QUICK_S, REFERENCE_S

    windows = {"quick": QUICK_S, "default": DEFAULT_S, "reference": REFERENCE_S}
    return windows[one_of(name, tuple(windows), "--window")]


def print_json(record: "Record", *, schema: str) -> None:
    """A record as one document on stdout."""
    import msgspec

    document = {"schema": schema, **msgspec.to_builtins(record)}
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n")
