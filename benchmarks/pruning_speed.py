"""How long pruning and its curves take, where the time goes, and how much memory they need.

OMP_NUM_THREADS=2 python benchmarks/pruning_speed.py --models deit_base_patch16_224 --pattern 64x16
OMP_NUM_THREADS=2 python benchmarks/pruning_speed.py --models deit_base_patch16_224 --curves

The weights are random, since the time does not depend on their values: nothing here says anything
about accuracy. Images are smooth noise at the model's size. One run of each model in a process of
its own, so that the peak memory is that model's.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lpvit_edge import prune as pruning
from lpvit_edge import rotate, sensitivity, solve
from lpvit_edge.deps import require
from lpvit_edge.layers import Walk, walk
from lpvit_edge.options import PATTERN_MENUS
from lpvit_edge.pattern import TWO_FOUR_SPARSITY, Pattern, parse_pattern

T = TypeVar("T")
# What is timed: the module in which a name is looked up, the name, and the word for it.
PHASES = (
    (pruning, "reorder_stage", "order of neurons and channels"),
    (pruning, "stage_pass", "forward passes, whole blocks"),
    (pruning, "layer_statistics", "forward passes to a layer, and its second moments"),
    (solve, "removal_costs", "selection"),
    (solve, "unmasked_solution", "solution without a mask"),
    (solve, "resolve", "re-solve on the mask"),
)
CURVE_PHASES = (
    (rotate, "rotated", "rotation"),
    (sensitivity, "gather_moments", "forward and backward passes, moments"),
    (sensitivity, "hessian_costs", "elimination for the curves"),
)


def timed(function: Callable[..., T], what: str, seconds: "Counter[str]") -> Callable[..., T]:
    """The function, its wall time added to seconds[what]."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> T:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[what] += time.perf_counter() - started  # type: ignore[assignment]

    return run


def smooth_images(count: int, size: int) -> torch.Tensor:
    """Noise (count, 3, size, size) with detail at several scales."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, 3, size, size)
    for side in (size // 32, size // 8, size):
        noise = torch.randn(count, 3, side, side, generator=generator)
        images += torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear")
    return images


def pruned(
    model: nn.Module, found: Walk, images: Tensor, patterns: tuple[Pattern, ...], sparsity: float
) -> int:
    """Prune every layer in the one pattern that is given; how many there are."""
    (pattern,) = patterns
    form = pruning.Form(pattern=pattern, sparsity=sparsity)
    forms = {layer.name: form for layer in found.layers}
    return sum(1 for _ in pruning.prune(model, found, forms, images))


def curves(
    model: nn.Module, found: Walk, images: Tensor, patterns: tuple[Pattern, ...], sparsity: float
) -> int:
    """As `lpvit sensitivity`, at all sparsities: rotate, then the curves; how many layers."""
    turned = rotate.rotated(model, found, images)
    moments = sensitivity.gather_moments(turned, found, images, None, patterns=patterns)
    for layer in found.layers:
        linear = turned.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        _ = list(sensitivity.layer_curves(layer, linear, moments[layer.name], images=len(images)))
    return len(found.layers)


def measure(
    name: str, *, what: str, patterns: Sequence[str], sparsity: float, images: int
) -> dict[str, Any]:
    """Do one thing to a model with random weights and note time, phases and peak memory."""
    torch.manual_seed(0)
    model = require("timm").create_model(name, num_classes=1000).eval()
    size = 224
    seconds: Counter[str] = Counter()
    do, phases_of = {"pruning": (pruned, PHASES), "curves": (curves, CURVE_PHASES)}[what]
    for module, attribute, word in phases_of:
        setattr(module, attribute, timed(getattr(module, attribute), word, seconds))
    found = walk(model, image_size=size)
    calibration = smooth_images(images, size)
    before_mib = _peak_mib()
    started, cpu_started = time.perf_counter(), time.process_time()
    layers = do(model, found, calibration, tuple(map(parse_pattern, patterns)), sparsity)
    total_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    phases = {what: round(value, 1) for what, value in seconds.items()}
    return {
        "model": name,
        "what": what,
        "pattern": ", ".join(patterns),
        "sparsity": sparsity if what == "pruning" else None,
        "images": images,
        "image_size": size,
        "layers": layers,
        "threads": torch.get_num_threads(),
        "total_s": round(total_s, 1),
        "cpu_s": round(cpu_s, 1),  # of all threads: far below threads * total_s on a busy machine
        "phases_s": phases,
        "other_s": round(total_s - sum(seconds.values()), 1),
        "peak_rss_mib": _peak_mib(),
        "rss_before_mib": before_mib,
    }


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["deit_small_patch16_224"])
    parser.add_argument("--pattern", default="64x16")
    parser.add_argument("--curves", action="store_true", help="not pruning but its curves")
    parser.add_argument("--sparsity", type=float, default=TWO_FOUR_SPARSITY)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path, help="append the results to this JSON file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        is_curves = arguments.curves
        row = measure(
            arguments.models[0],
            what="curves" if is_curves else "pruning",
            patterns=PATTERN_MENUS["openvino"] if is_curves else [arguments.pattern],
            sparsity=arguments.sparsity,
            images=arguments.images,
        )
        print(json.dumps(row))
        return
    rows = [_in_a_process_of_its_own(name, arguments) for name in arguments.models]
    for row in rows:
        print(json.dumps(row, indent=1))
    if arguments.out is not None:
        _append(arguments.out, rows)


def _in_a_process_of_its_own(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--pattern", arguments.pattern, "--sparsity", str(arguments.sparsity)]
    command = [sys.executable, __file__, "--one", "--models", name, *options]
    command += ["--images", str(arguments.images), *(["--curves"] if arguments.curves else [])]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    known: dict[str, Any] = {"schema": "lpvit.bench.pruning_speed/1", "rows": []}
    if path.exists():
        known = json.loads(path.read_text())
    known["machine"] = {
        "cpu": _cpu(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    known["rows"] += rows
    path.write_text(json.dumps(known, indent=1) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(names)} threads"


if __name__ == "__main__":
    main()
