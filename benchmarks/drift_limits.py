"""How soon a new defect could be found at best, by what is looked at: a bound, no test.

Each way of looking cuts frames into usual and unusual ones: a share p of the healthy line's frames
is unusual, a share q after the defect has come. A test that knows q and p needs log(c) / KL(q, p)
frames for evidence c. One that knows p from n healthy frames only cannot tell the change from
another order of the same frames: after m more, its evidence is at most the likelihood ratio
n KL(p, r) + m KL(q, r), r being the share in all n + m. The cut that is best for the defect is
taken, which no watch knows beforehand.

python -m benchmarks.drift_limits --frames /tmp/drift --out benchmarks/results/drift_limits.json
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.drift import load
from lpvit_edge.drift.evidence import rank_bounds
from lpvit_edge.drift.reference import Reference, Seen, load_reference
from lpvit_edge.drift.rules import Rules

CHANNELS = 9  # share the evidence of an alarm
SCORES = 7  # of them, that are compared with the reference
SHARES = (0.1, 0.05, 0.02, 0.01)
LONGEST = 5000
BEYOND = "frames beyond the reference's 99.9 % of their class"
OWN = 1000  # healthy frames that the line has seen


def divergence(a: float, b: float) -> float:
    """KL of Bernoulli(a) from Bernoulli(b)."""
    first = a * np.log(a / b) if a > 0 else 0.0
    return float(first + ((1 - a) * np.log((1 - a) / (1 - b)) if a < 1 else 0.0))


def least_frames(p: float, q: float, *, nats: float, healthy: int | None) -> int | None:
    """The fewest frames to that evidence; None where it takes more than LONGEST."""
    if q <= p or p <= 0:
        return None
    if healthy is None:
        found = int(np.ceil(nats / divergence(q, p)))
        return found if found <= LONGEST else None
    for m in range(1, LONGEST + 1):
        r = (healthy * p + m * q) / (healthy + m)
        if healthy * divergence(p, r) + m * divergence(q, r) >= nats:
            return m
    return None


def cuts(healthy: NDArray[Any], faulty: NDArray[Any]) -> Iterator[tuple[float, ...]]:
    """Shares above a threshold of the healthy and of the faulty frames, down to 1 in 20,000."""
    for share in np.logspace(-1, -4.3, 24):
        threshold = np.quantile(healthy, 1 - share)
        yield float(share), float((faulty > threshold).mean())


def cells(healthy: NDArray[np.int64], faulty: NDArray[np.int64]) -> Iterator[tuple[float, ...]]:
    """Shares in each cell; one that no healthy frame fell into counts as one in all of them."""
    count = int(max(healthy.max(), faulty.max())) + 1
    usual = np.maximum(np.bincount(healthy, minlength=count), 1) / len(healthy)
    unusual = np.bincount(faulty, minlength=count) / len(faulty)
    yield from zip(usual.tolist(), unusual.tolist(), strict=True)


def nearest(x: NDArray[np.float32], points: NDArray[np.float32], *, k: int) -> NDArray[np.float64]:
    """Squared distance of each row to its k-th nearest point."""
    found = [
        np.partition(_squared(x[start : start + 4000], points), k - 1, axis=1)[:, k - 1]
        for start in range(0, len(x), 4000)
    ]
    return np.concatenate(found).astype(np.float64)


def _squared(x: NDArray[np.float32], points: NDArray[np.float32]) -> NDArray[np.float32]:
    squared: NDArray[np.float32] = (
        np.square(x).sum(1)[:, None] + np.square(points).sum(1) - 2 * x @ points.T
    )
    return squared


def centres(x: NDArray[np.float32], *, count: int, seed: int = 0) -> NDArray[np.float32]:
    """k-means, 15 rounds."""
    found = x[np.random.default_rng(seed).permutation(len(x))[:count]].copy()
    for _ in range(15):
        nearest_of = _squared(x, found).argmin(axis=1)
        for cell in np.unique(nearest_of):
            found[cell] = x[nearest_of == cell].mean(axis=0)
    return found


def cell_of(x: NDArray[np.float32], points: NDArray[np.float32]) -> NDArray[np.int64]:
    found = [
        _squared(x[start : start + 4000], points).argmin(axis=1) for start in range(0, len(x), 4000)
    ]
    return np.concatenate(found)


def beyond(reference: Reference, heldout: Seen, seen: Seen, *, quantile: float) -> float:
    """Share of the frames that are farther from their class than that quantile of the reference."""
    usual, found = (
        (_distances(reference, s), s.probabilities.argmax(axis=1)) for s in (heldout, seen)
    )
    limits = np.full(len(reference.means), np.inf)
    for label in np.unique(usual[1]):
        limits[label] = np.quantile(usual[0][usual[1] == label], quantile)
    return float((found[0] > limits[found[1]]).mean())


def _distances(reference: Reference, seen: Seen) -> NDArray[np.float32]:
    own = seen.features - reference.means[seen.probabilities.argmax(axis=1)]
    squared: NDArray[np.float32] = np.square(own @ reference.whitening.T).sum(axis=1)
    return squared


def ways(folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """By what is looked at: pairs of (share of healthy frames, share of faulty frames)."""
    calibration, heldout = load(folder, "calibration"), load(folder, "heldout")
    healthy, faulty = load(folder, "control"), load(folder, "defect")
    reference, _ = load_reference(folder)
    white = {
        name: (seen.features @ reference.whitening.T).astype(np.float32)
        for name, seen in (("c", calibration), ("h", heldout), ("good", healthy), ("bad", faulty))
    }
    means = (reference.means @ reference.whitening.T).astype(np.float32)
    labels = [seen.probabilities.argmax(axis=1) for seen in (healthy, faulty)]
    rest, known = white["good"][20_000:], np.concatenate([white["c"], white["h"]])
    plain = np.concatenate([calibration.features, heldout.features])
    # An oracle: linear discriminant analysis that was shown the defect (half of its frames).
    half, sample = white["bad"][:1500], white["good"][:20_000]
    spread = np.cov(sample.T) + 0.05 * np.eye(sample.shape[1])
    oracle = np.linalg.solve(spread, half.mean(axis=0) - sample.mean(axis=0))
    finer = centres(known, count=256)
    return {
        "predicted class (labels)": list(cells(*labels)),
        "distance to its class (outliers)": list(
            cuts(
                np.square(white["good"] - means[labels[0]]).sum(1),
                np.square(white["bad"] - means[labels[1]]).sum(1),
            )
        ),
        BEYOND: [
            (
                beyond(reference, heldout, healthy, quantile=0.999),
                beyond(reference, heldout, faulty, quantile=0.999),
            )
        ],
        "distance to the nearest image of the reference": list(
            cuts(nearest(rest, known, k=1), nearest(white["bad"], known, k=1))
        ),
        "the same, in embeddings that are not whitened (reference)": list(
            cuts(*(nearest(x, plain, k=1) for x in (healthy.features[20_000:], faulty.features)))
        ),
        "distance to the line's own first 1,000 frames": list(
            cuts(*(nearest(x, white["good"][:OWN], k=2) for x in (rest, white["bad"])))
        ),
        "the same, in embeddings that are not whitened (own)": list(
            cuts(
                *(
                    nearest(x, healthy.features[:OWN], k=2)
                    for x in (healthy.features[20_000:], faulty.features)
                )
            )
        ),
        "256 cells of the reference (k-means)": list(
            cells(cell_of(rest, finer), cell_of(white["bad"], finer))
        ),
        "a discriminant that was shown the defect": list(
            cuts(rest @ oracle, white["bad"][1500:] @ oracle)
        ),
    }


def least_shares(reference: Reference) -> dict[str, float]:
    """What the rank bounds leave to frames beyond every image of the reference in their class.

    A rarer defect cannot be told from chance by the reference alone, however far it lies.
    """
    delta = Rules().delta / (2 * SCORES * len(reference.counts))
    return {str(n): float(rank_bounds(n, delta=delta)[0]) for n in (200, 2000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.frames
    nats = float(np.log(Rules().yellow_at * CHANNELS))
    rows: list[dict[str, Any]] = []
    looked_at = ways(folder)
    for name, pairs in looked_at.items():
        for share in SHARES:
            row: dict[str, Any] = {"way": name, "share": share}
            for column, healthy in (("known", None), ("10000", 10_000), ("1000", 1000)):
                found = [
                    least_frames(p, share * q + (1 - share) * p, nats=nats, healthy=healthy)
                    for p, q in pairs
                ]
                row[column] = min((m for m in found if m is not None), default=None)
            rows.append(row)
            print(row, flush=True)
    result = {
        "command": "python -m benchmarks.drift_limits --frames /tmp/drift --out "
        "benchmarks/results/drift_limits.json",
        "nats": nats,
        "least_share_beside_so_many_images_of_a_class": least_shares(load_reference(folder)[0]),
        "shares_of_healthy_and_faulty_frames_beyond": looked_at[BEYOND][0],
        "longest": LONGEST,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
