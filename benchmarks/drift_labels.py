"""The channel `labels` of the drift watch alone: which bets find a rare class sooner.

Old bets stake on powers of the p-value, as the other channels do; new ones on a share of small
p-values being so many times as large (lpvit_edge.drift.own_past.label_bets). The frames, the runs
and the threshold are those of benchmarks/drift.py; only this channel is computed, for all runs at
once.

python -m benchmarks.drift_labels --frames /tmp/drift --out benchmarks/results/drift_labels.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift import LONGEST, RUNS, load
from lpvit_edge.drift.evidence import BETS, bets
from lpvit_edge.drift.own_past import label_bets
from lpvit_edge.drift.reference import load_reference
from lpvit_edge.drift.rules import Rules

CHANNELS = 9  # share the evidence of an alarm
ROWS = ((1000, 0.1), (1000, 0.05), (1000, 0.02), (10_000, 0.05), (10_000, 0.02), (10_000, 0.01))
Bets = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def labels_of(
    healthy: NDArray[np.int64], faulty: NDArray[np.int64], *, before: int, share: float
) -> NDArray[np.int64]:
    """Categories (runs, before + LONGEST) of the frames that benchmarks/drift.py shows."""
    rows = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        good, bad = rng.permutation(len(healthy)), list(rng.permutation(len(faulty)))
        row = list(healthy[good[:before]])
        for number in range(1, LONGEST + 1):
            is_bad = rng.random() < share
            row.append(faulty[bad.pop()] if is_bad else healthy[good[before + number]])
        rows.append(row)
    return np.array(rows)


def first_alarms(
    labels: NDArray[np.int64], stake: Bets, count: int, *, categories: int, threshold: float
) -> NDArray[np.int64]:
    """Number of the frame at which the evidence reaches the threshold, by run; -1 for never."""
    runs, frames = labels.shape
    rng = np.random.default_rng(0)
    seen = np.zeros((runs, categories))
    R = np.zeros((runs * categories, count))
    found = np.full(runs, -1)
    every = np.arange(runs)
    for n in range(frames):
        u = rng.random((runs, categories))
        is_it = np.arange(categories) == labels[:, n, None]
        p = np.where(is_it, u * (seen + 1), seen + u * (n - seen + 1)) / (n + 1)
        R = (R + 1) * stake(p.ravel())
        level = R.reshape(runs, -1).mean(axis=1)
        found[(level >= threshold) & (found < 0)] = n + 1
        seen[every, labels[:, n]] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.frames
    reference, _ = load_reference(folder)
    healthy, faulty = (
        reference.category_of[load(folder, name).probabilities.argmax(axis=1)]
        for name in ("control", "defect")
    )
    ways: dict[str, tuple[Bets, int]] = {"powers": (bets, BETS), "shares": (label_bets, 21)}
    rows: list[dict[str, Any]] = []
    for before, share in ROWS:
        shown = labels_of(healthy, faulty, before=before, share=share)
        for name, (stake, count) in ways.items():
            alarms = first_alarms(
                shown,
                stake,
                count,
                categories=int(reference.category_of.max()) + 1,
                threshold=Rules().yellow_at * CHANNELS,
            )
            after = alarms[alarms > before] - before
            rows.append(
                {
                    "bets": name,
                    "healthy_frames_before": before,
                    "share": share,
                    "runs": RUNS,
                    "found": len(after),
                    "median_frames": float(np.median(after)) if len(after) else None,
                    "false_alarms_before": int(((alarms > 0) & (alarms <= before)).sum()),
                }
            )
            print(rows[-1], flush=True)
    result = {
        "command": "python -m benchmarks.drift_labels --frames /tmp/drift --out "
        "benchmarks/results/drift_labels.json",
        "threshold": Rules().yellow_at * CHANNELS,
        "longest": LONGEST,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
