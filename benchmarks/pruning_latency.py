"""Uniform and allocated pruning at equal measured latency on the CPU engine.

    python -m benchmarks.pruning_latency --model model --step profile
    python -m benchmarks.pruning_latency --model model --step prune --mixed
    python -m benchmarks.pruning_latency --model model --step time

profiles this machine, prunes uniformly in every pattern to rising sparsities, and allocates for the
latency that the profile predicts of each of them, a little less so that it is kept when measured:
in the same pattern, and in all patterns mixed. All networks of a model are then timed in turns with
the dense one. Each uniform network is set beside the slowest allocated one that was measured no
slower, image by image (benchmarks/pruning_equal.py). As in `lpvit allocate`, a layer that is not
faster in a form stays dense, in the uniform networks too. Profile and time need a machine that does
nothing else; prune goes on where it stopped. The residual streams are rotated, as `lpvit
sensitivity` does by default; with --as-it-is they are not, and the sparsities are lower.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn import functional

from benchmarks.pruning import ROOT, command
from benchmarks.pruning_equal import Network, packed, page
from benchmarks.pruning_methods import repaired
from benchmarks.pruning_plans import AS_IT_IS, SPARSITIES, Plan, plans
from benchmarks.pruning_rows import paired_drop
from benchmarks.pruning_subject import Source, Subject, batches
from lpvit_edge import files
from lpvit_edge.device_profile import profile_device
from lpvit_edge.export import export_onnx
from lpvit_edge.images import content_sha256
from lpvit_edge.job import prepare_without_images
from lpvit_edge.profile import random_input
from lpvit_edge.records import DeviceProfile, Sensitivity
from lpvit_edge.trial import masked_by_magnitude
from lpvit_engines import load_engine
from lpvit_engines.base import Engine
from lpvit_profilers.latency import LatencyMeasurement, measure_alternating

SCHEMA = "lpvit.bench.pruning_latency/1"


def mean_loss(subject: Subject, model: nn.Module) -> float:
    """Cross-entropy on the calibration images, which is what the distortions predict."""
    with torch.inference_mode():
        logits = torch.cat([model(images) for images in batches(subject.images, 32)])
    return float(functional.cross_entropy(logits, subject.targets))


def timed(
    paths: Mapping[str, Path], *, threads: int, seconds: float
) -> dict[str, LatencyMeasurement]:
    """Latency of every network, all in alternation."""
    with ExitStack() as stack:
        runs = {
            name: _run(stack.enter_context(load_engine("openvino", path, threads=threads)))
            for name, path in paths.items()
        }
        return measure_alternating(runs, min_time_s=seconds)


def _run(engine: Engine) -> Callable[[], object]:
    x = random_input(engine)
    return lambda: engine.infer(x)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "factory_line")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "equal_latency", help="profile and networks"
    )
    parser.add_argument("--model", default="model", help="of examples/factory_line")
    parser.add_argument("--step", choices=("profile", "prune", "time"), required=True)
    parser.add_argument("--patterns", nargs="+", choices=SPARSITIES, default=tuple(SPARSITIES))
    parser.add_argument("--as-it-is", action="store_true", help="do not rotate the streams")
    parser.add_argument("--mixed", action="store_true", help="all the patterns mixed, too")
    parser.add_argument("--profile-seconds", type=float, default=180.0)
    parser.add_argument("--seconds", type=float, default=3.0, help="per network")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.work /= given.model if given.as_it_is else f"{given.model}_rotated"
    given.work.mkdir(parents=True, exist_ok=True)
    path = ROOT / "examples" / "factory_line" / f"{given.model}.toml"
    source = Source(path, given.data, calibration=256, heldout=None)
    {"profile": profile_step, "prune": prune_step, "time": time_step}[given.step](given, source)


def profile_step(given: argparse.Namespace, source: Source) -> None:
    """device_profile.json and dense.onnx: to be made while nothing else runs."""
    job = prepare_without_images(
        source.loaded,
        given.work,
        engine="openvino",
        threads=given.threads,
        patterns=tuple(given.patterns),
    )
    profile_device(job, seconds=given.profile_seconds)


def prune_step(given: argparse.Namespace, source: Source) -> None:
    """Every network pruned, scored and exported; needs no quiet machine."""
    subject = source.subject(given.patterns)
    subject = subject if given.as_it_is else subject.rotated
    profile = files.load(DeviceProfile, given.work / "device_profile.json")
    sensitivity = curves(subject, source, given.work / "sensitivity.json")
    folder = _networks(given.work)
    folder.mkdir(exist_ok=True)
    dense_loss = mean_loss(subject, subject.module)
    grid = AS_IT_IS if given.as_it_is else SPARSITIES
    sparsities = {pattern: grid[pattern] for pattern in given.patterns}
    for plan in plans(profile, sensitivity, sparsities, mixed=given.mixed):
        path = folder / f"{plan.name}.json"
        if path.exists():
            continue
        network = made(subject, plan, given.work, size=source.loaded.preprocess.image_size)
        network["predicted_share"] = plan.predicted_ms / profile.dense.median_ms
        network["loss_rise"] -= dense_loss
        files.write_atomic(path, json.dumps(network).encode())
        print(f"{plan.name}: drop {network['drop']:.2f}, {network['gone']}", flush=True)


def curves(subject: Subject, source: Source, path: Path) -> Sensitivity:
    """The curves of every layer in every pattern; kept, since they take a while."""
    if not path.exists():
        found = Sensitivity(
            model=source.identity,
            images=len(subject.images),
            images_sha256=content_sha256(source.calibration),
            curves=subject.curves,
        )
        files.save(found, path)
    return files.load(Sensitivity, path)


def _networks(work: Path) -> Path:
    """Where the networks' records lie; another profile gives other allocations."""
    return work / f"networks_{files.sha256_of(work / 'device_profile.json')[:12]}"


def _place(network: dict[str, Any]) -> tuple[str, float, str]:
    return network["pattern"], network["sparsity"], network["plan"]


def made(subject: Subject, plan: Plan, folder: Path, *, size: int) -> dict[str, Any]:
    """One network pruned, exported as `lpvit optimize` does, and scored in torch.

    Beside an allocated one lies what allocation times before anything is pruned: magnitude masks in
    the same forms, nothing taken out (lpvit_edge.allocate_timed).
    """
    model = repaired(subject, plan.forms) if plan.forms else subject.module
    patterns = {layer: form.pattern for layer, form in plan.forms.items()}
    path = folder / f"{plan.name}.onnx"
    gone = export_onnx(model, subject.walk, patterns, path, image_size=size, shrunk=True)
    if plan.plan == "allocated":
        trial = masked_by_magnitude(subject.module, plan.forms)
        path = folder / f"trial_{plan.name}.onnx"
        export_onnx(trial, subject.walk, patterns, path, image_size=size)
    logits = subject.logits(model)
    right = subject.right(logits)
    return {
        "name": plan.name,
        "plan": plan.plan,
        "pattern": plan.pattern,
        "sparsity": plan.sparsity,
        "forms": {name: f"{form.pattern} {form.sparsity:g}" for name, form in plan.forms.items()},
        "gone": gone,
        "distortion": plan.distortion,
        "loss_rise": mean_loss(subject, model),
        "divergence": subject.divergence(logits),
        "right": packed(right),
        "dense_right": packed(subject.dense_right),
        **paired_drop(subject.dense_right, right),
    }


def time_step(given: argparse.Namespace, source: Source) -> None:
    """All networks in alternation: to be timed while nothing else runs."""
    found = (json.loads(p.read_text("utf-8")) for p in sorted(_networks(given.work).glob("*.json")))
    kept: dict[str, dict[str, Any]] = {k["name"]: k for k in sorted(found, key=_place)}
    names = [*kept, *(f"trial_{name}" for name, k in kept.items() if k["plan"] == "allocated")]
    paths = {name: given.work / f"{name}.onnx" for name in ("dense", *names)}
    measured = timed(paths, threads=given.threads, seconds=given.seconds)
    dense_ms = measured["dense"].median_ms
    networks = [
        Network(
            latency_ms=measured[name].median_ms,
            mad_ms=measured[name].mad_ms,
            share=measured[name].median_ms / dense_ms,
            trial_share=measured[trial].median_ms / dense_ms if trial in measured else None,
            **{key: value for key, value in k.items() if key in Network.__struct_fields__},
        )
        for name, k in kept.items()
        for trial in (f"trial_{name}",)
    ]
    profile = files.load(DeviceProfile, given.work / "device_profile.json")
    section = {
        "command": command("benchmarks.pruning_latency"),
        "facts": source.facts(),
        "device": profile.device,
        "profile_reasons": profile.reasons,
        "dense_ms": dense_ms,
        "dense_mad_ms": measured["dense"].mad_ms,
        "threads": given.threads,
        "unstable": [name for name, m in measured.items() if not m.stable],
        "networks": msgspec.to_builtins(networks),
    }
    path = given.out / "pruning_latency.json"
    document = json.loads(path.read_text("utf-8")) if path.exists() else {"schema": SCHEMA}
    name = f"{given.model}, not rotated" if given.as_it_is else given.model
    document = {**document, name: section}
    files.write_atomic(path, json.dumps(document, indent=1).encode() + b"\n")
    page(path)


if __name__ == "__main__":
    main()
