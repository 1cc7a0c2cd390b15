"""How soon the drift watch sees a fault, what it calls it, and how often it cries wolf.

Reads what benchmarks/drift_frames.py left: what a bundle's engine made of the frames, and the
reference that `lpvit check` made with the same engine. Delays are in frames since the fault began,
each run after 1,000 healthy frames drawn anew; the control is 100,000 healthy frames once through
(--control-seeds 0 leaves it out, --only control the runs).

python benchmarks/drift_frames.py runs/demo --out /tmp/drift --processes 2
python benchmarks/drift.py --frames /tmp/drift --out benchmarks/results/drift.json
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lpvit_edge.drift.reference import Reference, Seen, load_reference, rows_of, softmax
from lpvit_edge.drift.rules import Rules
from lpvit_edge.drift.watch import DriftWatch

RUNS = 20
HEALTHY = 1000
LONGEST = 5000
POOL = 40_000  # healthy frames that the runs are drawn from, the first ones
# Stream, share of the frames that have the fault, and the cause that should be named.
FAULTS: tuple[tuple[str, float, str], ...] = (
    ("lamp-0.9", 1.0, "light"),
    ("lamp-0.8", 1.0, "light"),
    ("lamp-0.6", 1.0, "light"),
    ("blur-0.5", 1.0, "focus"),
    ("blur-0.8", 1.0, "focus"),
    ("blur-1.2", 1.0, "focus"),
    ("material", 1.0, "material"),
    ("material", 0.1, "material"),
    ("defect", 1.0, "unknown content"),
    ("defect", 0.2, "unknown content"),
    ("defect", 0.1, "unknown content"),
    ("defect", 0.05, "unknown content"),
    ("defect", 0.02, "unknown content"),
)


def load(folder: Path, name: str) -> Seen:
    found = load_file(folder / f"{name}.safetensors")
    return Seen(
        features=found["features"],
        probabilities=softmax(found["logits"]),
        statistics=found["statistics"],
    )


def control(reference: Reference, seen: Seen, *, seeds: int) -> list[dict[str, Any]]:
    """Alarms over the healthy frames, in the order they were generated, by seed of the ties."""
    found = []
    for seed in range(seeds):
        watch = DriftWatch(reference, Rules(), seed=seed)
        yellow = red = 0
        highest = 0.0
        begin_s = time.perf_counter()
        for frame in rows_of(seen):
            state = watch.add(*frame)
            yellow += state.raised == "yellow"
            red += state.raised == "red"
            highest = max(highest, max(state.evidence.values()))
        us = (time.perf_counter() - begin_s) / len(seen.features) * 1e6
        found.append(
            {
                "frames": len(seen.features),
                "yellow": int(yellow),
                "red": int(red),
                "highest_evidence": highest,
                "us_per_frame": us,
            }
        )
    return found


def delays(
    reference: Reference,
    healthy: Seen,
    faulty: Seen,
    *,
    share: float,
    before: int,
    runs: int,
    rules: Rules,
    restart: bool,
) -> list[dict[str, Any]]:
    """Frames from the fault to the yellow and to the red alarm, and the cause that red names."""
    return [
        one_run(reference, healthy, faulty, share, before, rules, seed, restart)
        for seed in range(runs)
    ]


def one_run(
    reference: Reference,
    healthy: Seen,
    faulty: Seen,
    share: float,
    before: int,
    rules: Rules,
    seed: int,
    restart: bool,
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    watch = DriftWatch(reference, rules, seed=seed)
    good, bad = (
        rng.permutation(min(POOL, len(healthy.features))),
        rng.permutation(len(faulty.features)),
    )
    for index in good[:before]:
        watch.add(*row(healthy, index))
    if restart:
        before_it, watch = watch, DriftWatch(reference, rules, seed=seed + RUNS)
        watch.remember(before_it.past())
    result: dict[str, Any] = {"yellow": None, "red": None, "cause": None, "yellow_cause": None}
    used = 0
    for number in range(1, LONGEST + 1):
        if rng.random() < share and used < len(bad):
            frame, used = row(faulty, bad[used]), used + 1
        elif share == 1.0:
            break  # every faulty frame has been shown
        else:
            frame = row(healthy, good[before + number])
        state = watch.add(*frame)
        if state.raised is not None:
            result["yellow"] = result["yellow"] or number
            result["yellow_cause"] = result["yellow_cause"] or state.cause
        if state.raised == "red":
            return result | {"red": number, "cause": state.cause}
    return result


def row(seen: Seen, index: int) -> Any:
    return seen.features[index], seen.probabilities[index], seen.statistics[index]


def slow(reference: Reference, seen: Seen) -> dict[str, Any]:
    """The lamp that loses 40 % over 6,000 frames: what was left of it at the alarms."""
    watch = DriftWatch(reference, Rules())
    found: dict[str, Any] = {"frames": len(seen.features)}
    for number, frame in enumerate(rows_of(seen), start=1):
        state = watch.add(*frame)
        if state.raised is not None and state.raised not in found:
            left = 1 - 0.4 * number / len(seen.features)
            found[state.raised] = {"frame": number, "light_left": left, "cause": state.cause}
    return found


def summary(runs: list[dict[str, Any]], cause: str) -> dict[str, Any]:
    red = sorted(run["red"] for run in runs if run["red"] is not None)
    yellow = sorted(run["yellow"] for run in runs if run["yellow"] is not None)
    return {
        "runs": len(runs),
        "yellow": len(yellow),
        "yellow_median": float(np.median(yellow)) if yellow else None,
        "red": len(red),
        "red_median": float(np.median(red)) if red else None,
        "red_longest": red[-1] if red else None,
        "yellow_causes": {
            str(name): sum(run["yellow_cause"] == name for run in runs)
            for name in sorted({str(run["yellow_cause"]) for run in runs})
        },
        "cause_right": sum(run["cause"] == cause for run in runs),
        "causes": {
            str(name): sum(run["cause"] == name for run in runs)
            for name in sorted({str(run["cause"]) for run in runs})
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--control-seeds", type=int, default=2)
    parser.add_argument("--before", type=int, default=HEALTHY, help="Healthy frames first.")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--without-labels", action="store_true", help="watch_labels = false")
    parser.add_argument("--restart", action="store_true", help="Start anew before the fault.")
    parser.add_argument("--only", help="Faults that begin so, such as 'defect 0.0'.", default="")
    arguments = parser.parse_args()
    folder = arguments.frames
    reference, note = load_reference(folder)
    healthy = load(folder, "control")
    rules = Rules(watch_labels=not arguments.without_labels)
    result: dict[str, Any] = {
        "command": "python benchmarks/drift_frames.py runs/demo --out /tmp/drift --processes 2 && "
        "python benchmarks/drift.py " + shlex.join(sys.argv[1:]),
        "engine": note.engine,
        "onnx_sha256": note.onnx_sha256,
        "heldout_images": note.heldout_images,
        "yellow_at": rules.yellow_at,
        "red_at": rules.red_at,
        "shrinkage": note.shrinkage,
        "control": control(reference, healthy, seeds=arguments.control_seeds),
        "healthy_frames_before": arguments.before,
        "restart_before_the_fault": arguments.restart,
        "lamp_losing_40_percent_over_6000_frames": slow(reference, load(folder, "lamp-slow")),
        "faults": [],
    }
    for seeded in result["control"]:
        print("control", seeded)
    print("slow lamp", result["lamp_losing_40_percent_over_6000_frames"])
    for name, share, cause in FAULTS:
        if not f"{name} {share:g}".startswith(arguments.only):
            continue
        runs = delays(
            reference,
            healthy,
            load(folder, name),
            share=share,
            before=arguments.before,
            runs=arguments.runs,
            rules=rules,
            restart=arguments.restart,
        )
        predicted = np.bincount(load(folder, name).probabilities.argmax(axis=1))
        shares = (predicted / predicted.sum()).round(4).tolist()
        found = {"fault": name, "share": share, "predicted_classes": shares}
        result["faults"].append({**found, **summary(runs, cause)})
        print(result["faults"][-1])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
