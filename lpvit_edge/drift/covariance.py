"""How far an embedding lies from what the model was checked on. Pure functions on arrays."""

from typing import TYPE_CHECKING

import numpy as np

from lpvit_edge.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def ledoit_wolf(X: "NDArray[np.floating]") -> "tuple[NDArray[np.float64], float]":
    """Covariance of centred rows X (n, d), drawn towards a multiple of the identity: (d, d), rho.

    S* = rho m I + (1 - rho) S, with m = tr(S) / d, rho = min(b^2, d^2) / d^2, where
    d^2 = |S - m I|^2 and b^2 = 1/n^2 sum |x x^T - S|^2. Ledoit and Wolf, "A well-conditioned
    estimator for large-dimensional covariance matrices", J. Multivariate Analysis 88 (2004),
    section 3. Invertible also with fewer images than features.
    """
    X = np.asarray(X, np.float64)
    n, d = X.shape
    S = X.T @ X / n
    m = float(np.trace(S)) / d
    spread = float(np.square(S - m * np.eye(d)).sum())
    fourth = float(np.square(np.square(X).sum(axis=1)).sum())
    error = (fourth / n - float(np.square(S).sum())) / n
    rho = 1.0 if spread == 0.0 else min(max(error, 0.0), spread) / spread
    return rho * m * np.eye(d) + (1 - rho) * S, rho


def class_means(
    X: "NDArray[np.floating]", classes: "NDArray[np.integer]", *, count: int, least: int
) -> "NDArray[np.float64]":
    """Mean embedding of each class (count, d); of all rows where a class has fewer than `least`."""
    X = np.asarray(X, np.float64)
    means = np.tile(X.mean(axis=0), (count, 1))
    for label in range(count):
        rows = X[classes == label]
        if len(rows) >= least:
            means[label] = rows.mean(axis=0)
    return means


def whitening(covariance: "NDArray[np.float64]") -> "NDArray[np.float32]":
    """W (d, d) with W^T W the inverse covariance, so that |W (x - mean)| is Mahalanobis' distance.

    Raises DataError when all embeddings are equal.
    """
    try:
        lower = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError as error:
        raise DataError(
            "the embeddings of the calibration images do not vary, so nothing can be told from "
            "their distance; give images that differ"
        ) from error
    return np.asarray(np.linalg.solve(lower, np.eye(len(lower))), np.float32)


def distance_per_feature(
    x: "NDArray[np.floating]", mean: "NDArray[np.floating]", W: "NDArray[np.floating]"
) -> float:
    """Squared Mahalanobis distance over the number of features: about 1 for a usual image."""
    z = W @ (np.asarray(x, np.float32) - mean)
    return float(z @ z) / len(z)
