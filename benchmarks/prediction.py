"""How well the device profile predicts whole networks: random allocations, predicted and measured.

    python benchmarks/prediction.py                              DeiT-S, ten allocations
    python benchmarks/prediction.py --model deit_tiny_patch16_224 --allocations 3

Weights and masks are random: latency does not depend on them. Each allocation gives every layer a
form drawn from the profile; its network is built, timed in alternation with the dense one, and set
beside the profile's sum. The dense engine of the same minute corrects for drift of the machine.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from lpvit_edge.allocate_timed import network_share
from lpvit_edge.deps import require
from lpvit_edge.device_profile import profile_device
from lpvit_edge.files import write_atomic
from lpvit_edge.images import Preprocess
from lpvit_edge.job import Job, available_threads, prepare_without_images
from lpvit_edge.layer_options import SPARSITIES, interpolated_latency
from lpvit_edge.models import LoadedModel
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form
from lpvit_edge.records import DeviceProfile, GemmCost, LayerShape, ModelIdentity

SCHEMA = "lpvit.bench.prediction/1"


def random_job(name: str, *, image_size: int, folder: Path, threads: int) -> Job:
    """A timm model with random weights."""
    torch = require("torch")
    torch.manual_seed(0)
    module = require("timm").create_model(name).eval()
    identity = ModelIdentity(name=name, weights_sha256="random, seed 0", image_size=image_size)
    loaded = LoadedModel(
        module=module,
        identity=identity,
        preprocess=Preprocess(image_size=image_size),
        labels=None,
        calibration=None,
        heldout=None,
    )
    return prepare_without_images(
        loaded, folder, engine="openvino", threads=threads, patterns=("64x1", "64x16", "32x32")
    )


def random_forms(profile: DeviceProfile, generator: random.Random) -> tuple[dict[str, Form], float]:
    """A form for each layer (dense for one in five), and the latency in ms the profile predicts."""
    forms: dict[str, Form] = {}
    predicted_ms = profile.rest_ms
    for layer in profile.layers:
        costs = costs_of(profile, layer)
        pattern = generator.choice(sorted(costs.keys() - {"dense"}))
        if generator.random() < 0.2:
            predicted_ms += costs["dense"][0].latency_ms
            continue
        lowest = min(cost.sparsity for cost in costs[pattern])
        sparsity = generator.choice([s for s in SPARSITIES if s >= lowest])
        forms[layer.name] = Form(pattern=parse_pattern(pattern), sparsity=sparsity)
        predicted_ms += interpolated_latency(costs[pattern])(sparsity)
    return forms, predicted_ms


def costs_of(profile: DeviceProfile, layer: LayerShape) -> dict[str, list[GemmCost]]:
    """The measured forms of a layer, by pattern."""
    key = (layer.tokens, layer.in_features, layer.out_features, layer.activation)
    found: dict[str, list[GemmCost]] = {}
    for gemm in profile.gemms:
        if (gemm.tokens, gemm.in_features, gemm.out_features, gemm.activation) == key:
            found.setdefault(gemm.pattern, []).append(gemm)
    return found


def compare(job: Job, profile: DeviceProfile, *, allocations: int) -> list[dict[str, Any]]:
    """One row for each allocation."""
    generator = random.Random(0)
    rows = []
    for number in range(allocations):
        forms, predicted_ms = random_forms(profile, generator)
        share = network_share(job, forms, seconds=3.0)
        measured_ms = share * profile.dense.median_ms
        error = predicted_ms / measured_ms - 1.0
        rows.append(
            {
                "allocation": number,
                "sparse_layers": len(forms),
                "mean_sparsity": statistics.fmean(form.sparsity for form in forms.values()),
                "predicted_ms": predicted_ms,
                "measured_ms": measured_ms,
                "error": error,
            }
        )
        print(
            f"{number}: predicted {predicted_ms:.2f} ms, measured {measured_ms:.2f} ms {error:+.1%}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--allocations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0, help="0: all this process may use")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    given = parser.parse_args()
    threads = given.threads or available_threads()
    with tempfile.TemporaryDirectory() as scratch:
        job = random_job(
            given.model, image_size=given.image_size, folder=Path(scratch), threads=threads
        )
        profile = profile_device(job)
        rows = compare(job, profile, allocations=given.allocations)
    errors = [abs(row["error"]) for row in rows]
    result = {
        "schema": SCHEMA,
        "command": f"python benchmarks/prediction.py --model {given.model}",
        "model": given.model,
        "engine": f"{profile.engine} {profile.engine_version}",
        "threads": threads,
        "device": profile.device,
        "dense_ms": profile.dense.median_ms,
        "sum_over_measured": profile.sum_over_measured,
        "rank_correlation": profile.rank_correlation,
        "reasons": list(profile.reasons),
        "median_absolute_error": statistics.median(errors),
        "rows": rows,
    }
    print(
        f"median absolute error {result['median_absolute_error']:.1%} over {len(rows)} allocations"
    )
    if given.out:
        write_atomic(given.out, json.dumps(msgspec.to_builtins(result), indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
