"""Uniform and allocated pruning at equal measured latency on the CPU engine.

    python -m benchmarks.pruning_latency --pattern 64x16 --step profile
    python -m benchmarks.pruning_latency --pattern 64x16 --step prune
    python -m benchmarks.pruning_latency --pattern 64x16 --step time

profiles this machine, prunes uniformly to rising sparsities, and allocates under the latency that
the profile predicts for each of them. All networks are then timed in turns with the dense one. An
allocated network is set beside the uniform drop at its own measured latency, interpolated between
the two uniform networks around it. The rows go into pruning.json as `equal_latency`. Profile and
time need a machine that does nothing else.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.pruning import ROOT, command
from benchmarks.pruning_methods import repaired
from benchmarks.pruning_rows import Row, Store, paired_drop
from benchmarks.pruning_subject import Source, Subject, batches
from lpvit_edge import files
from lpvit_edge.allocate import allocate
from lpvit_edge.device_profile import profile_device
from lpvit_edge.export import export_onnx
from lpvit_edge.images import content_sha256
from lpvit_edge.job import prepare_without_images
from lpvit_edge.layer_options import layer_options
from lpvit_edge.network_cost import latency_ms
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.profile import random_input
from lpvit_edge.prune import Form
from lpvit_edge.records import DeviceProfile, Sensitivity
from lpvit_edge.steps import forms as forms_of
from lpvit_engines import load_engine
from lpvit_engines.base import Engine
from lpvit_profilers.latency import LatencyMeasurement, measure_alternating

# Below these nothing that 2,000 images can show is lost.
SPARSITIES = {"64x1": (0.7, 0.8, 0.85, 0.9), "64x16": (0.5, 0.6, 0.7, 0.8)}


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """One pruned network: how it was asked for, timed and scored."""

    plan: str  # uniform | allocated
    sparsity: float  # of uniform; allocated has the latency predicted for that
    latency_ms: float
    mad_ms: float  # median absolute deviation
    share: float  # of the dense latency, measured
    predicted_share: float
    drop: float
    drop_low: float
    drop_high: float
    distortion: float | None = None  # predicted rise of the loss, all layers added up
    loss_rise: float | None = None  # on the calibration images
    uniform_drop: float | None = None  # of uniform pruning at this latency


Plans = dict[tuple[str, float], tuple[dict[str, Form], float]]


def plans(subject: Subject, profile: DeviceProfile, sensitivity: Sensitivity, name: str) -> Plans:
    """Forms of every network, with the latency in ms that the profile predicts."""
    found: Plans = {}
    pattern = parse_pattern(name)
    options = layer_options(profile, sensitivity, criterion="hessian", patterns=(name,))
    for sparsity in SPARSITIES[name]:
        chosen = [next(o for o in opts if o.sparsity == sparsity) for opts in options]
        budget_ms = latency_ms(profile, chosen)
        form = Form(pattern=pattern, sparsity=sparsity)
        found["uniform", sparsity] = {x.name: form for x in subject.fitting(pattern)}, budget_ms
        allocation = allocate(
            profile, sensitivity, budget={"latency_ms": budget_ms}, patterns=(name,)
        )
        found["allocated", sparsity] = forms_of(allocation), allocation.predicted_latency_ms
    return found


def sum_of_distortions(subject: Subject, forms: Mapping[str, Form]) -> float:
    """What the curves say that the forms do to the loss, all layers added up."""
    at = {
        (curve.layer, curve.pattern): dict(zip(curve.sparsity, curve.distortion, strict=True))
        for curve in subject.curves
        if curve.criterion == "hessian"
    }
    return sum(at[name, str(form.pattern)][form.sparsity] for name, form in forms.items())


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


def with_uniform_drops(networks: Sequence[Network]) -> list[Network]:
    """Beside each allocated network the uniform drop at its latency; None outside their range."""
    uniform = sorted((n for n in networks if n.plan == "uniform"), key=lambda n: n.share)
    shares, drops = [n.share for n in uniform], [n.drop for n in uniform]
    return [
        msgspec.structs.replace(n, uniform_drop=float(np.interp(n.share, shares, drops)))
        if n.plan == "allocated" and shares[0] <= n.share <= shares[-1]
        else n
        for n in networks
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "factory_line")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "equal_latency", help="profile and networks"
    )
    parser.add_argument("--model", default="model")
    parser.add_argument("--step", choices=("profile", "prune", "time"), required=True)
    parser.add_argument("--pattern", choices=SPARSITIES, required=True)
    parser.add_argument("--profile-seconds", type=float, default=60.0)
    parser.add_argument("--seconds", type=float, default=4.0, help="per network")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    given = parser.parse_args()
    given.work /= given.pattern
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
        patterns=(given.pattern,),
    )
    profile_device(job, seconds=given.profile_seconds)


def prune_step(given: argparse.Namespace, source: Source) -> None:
    """Every network pruned, scored and exported; needs no quiet machine."""
    subject = source.subject([given.pattern])
    profile = files.load(DeviceProfile, given.work / "device_profile.json")
    sensitivity = Sensitivity(
        model=source.identity,
        images=len(subject.images),
        images_sha256=content_sha256(source.calibration),
        curves=subject.curves,
    )
    size = source.loaded.preprocess.image_size
    dense_loss = mean_loss(subject, subject.module)
    kept = []
    for (plan, sparsity), (forms, predicted_ms) in plans(
        subject, profile, sensitivity, given.pattern
    ).items():
        model = repaired(subject, forms)
        name = f"{plan}_{sparsity:g}"
        patterns = {layer: form.pattern for layer, form in forms.items()}
        export_onnx(model, subject.walk, patterns, given.work / f"{name}.onnx", image_size=size)
        drop = paired_drop(subject.dense_right, subject.right(model))
        distortion = sum_of_distortions(subject, forms)
        predicted = {"predicted_share": predicted_ms / profile.dense.median_ms}
        loss = mean_loss(subject, model)
        kept.append(
            {"plan": plan, "sparsity": sparsity, **predicted, **drop}
            | {"distortion": distortion, "loss_rise": loss - dense_loss}
        )
        print(f"{name}: drop {drop['drop']:.2f}", flush=True)
    files.write_atomic(given.work / "networks.json", json.dumps(kept, indent=1).encode())


def uniform_rows(model: str, pattern: str, kept: list[dict[str, Any]]) -> list[Row]:
    """The uniform networks are cells of the accuracy grid too."""
    fields = ("sparsity", "accuracy", "drop", "drop_low", "drop_high", "lost", "won")
    return [
        Row(model=model, method="uniform", pattern=pattern, **{name: k[name] for name in fields})
        for k in kept
        if k["plan"] == "uniform"
    ]


def time_step(given: argparse.Namespace, source: Source) -> None:
    """All networks in alternation: to be timed while nothing else runs."""
    kept = json.loads((given.work / "networks.json").read_text(encoding="utf-8"))
    names = [f"{k['plan']}_{k['sparsity']:g}" for k in kept]
    paths = {name: given.work / f"{name}.onnx" for name in names}
    measured = timed(
        {"dense": given.work / "dense.onnx", **paths},
        threads=given.threads,
        seconds=given.seconds,
    )
    dense = measured["dense"].median_ms
    networks = [
        Network(
            plan=k["plan"],
            sparsity=k["sparsity"],
            latency_ms=measured[name].median_ms,
            mad_ms=measured[name].mad_ms,
            share=measured[name].median_ms / dense,
            predicted_share=k["predicted_share"],
            **{key: k[key] for key in ("drop", "drop_low", "drop_high")},
            distortion=k.get("distortion"),
            loss_rise=k.get("loss_rise"),
        )
        for k, name in zip(kept, paths, strict=True)
    ]
    store = Store(given.out / "pruning.json", {given.model: source.facts()})
    for row in uniform_rows(given.model, given.pattern, kept):
        if row not in store:
            store.add(row)
    profile = files.load(DeviceProfile, given.work / "device_profile.json")
    section = {
        "model": given.model,
        "command": command("benchmarks.pruning_latency"),
        "device": profile.device,
        "profile_reasons": profile.reasons,
        "dense_ms": dense,
        "threads": given.threads,
        "stable": all(m.stable for m in measured.values()),
        "networks": msgspec.to_builtins(with_uniform_drops(networks)),
    }
    others = store.document.get("equal_latency", {})
    store.save(equal_latency={**others, given.pattern: section})


if __name__ == "__main__":
    main()
