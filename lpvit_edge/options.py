"""Options that several verbs share, and what they are turned into."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

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
Images: TypeAlias = Annotated[int, typer.Option(min=1, help="How many calibration images to use.")]
Out: TypeAlias = Annotated[Path, typer.Option("--out", "-o", help="The run folder.")]
Engine: TypeAlias = Annotated[str, typer.Option(help="The engine that runs the model.")]
Threads: TypeAlias = Annotated[
    int, typer.Option(min=0, help="Threads of the engine; 0: all that this process may use.")
]
Patterns: TypeAlias = Annotated[
    str, typer.Option(help="Patterns to choose from, output rows x input columns, by comma.")
]
Target: TypeAlias = Annotated[
    str, typer.Option(help="Latency to reach: 0.5x of the dense engine, or 12ms.")
]
Allocator: TypeAlias = Annotated[str, typer.Option(help="milp (exact), slope (LPViT), uniform.")]
Criterion: TypeAlias = Annotated[
    str, typer.Option(help="hessian (after repair) or taylor (LPViT, mask only).")
]
Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")
]

DEFAULT_PATTERNS = "64x1,64x16,32x32"
