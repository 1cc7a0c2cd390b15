"""Frames of all classes together, against what the line itself has shown: outliers and labels.

A new kind of defect in a few parts falls into classes that are rare on the line, where ranks among
frames of the same class say little. Two things still show it: frames far from everything come more
often (`outliers`, the squared Mahalanobis distance whatever the class), and the classes that they
are taken for come more often (`labels`). Neither is compared with the reference, whose mix of
classes is another one; ranks among the line's own frames are exact, see evidence.smoothed_p.
"""

from typing import TYPE_CHECKING

import numpy as np

from lpvit_edge.drift.evidence import BETS, BINS, CHANNELS, HIGHEST, bets

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAMES = ("outliers", "labels")
_DISTANCE = CHANNELS[0]


class OwnPast:
    """Shiryaev-Roberts e-detectors as in evidence.Evidence; `labels` is the mean over categories.

    The p-value of a category is that of "this frame is of it": (u (k + 1)) / (n + 1) where it is,
    and (k + u (n - k + 1)) / (n + 1) where it is not, with k of n frames before, u uniform. It is
    uniform while frames are exchangeable, and small where a rare category comes again and again.
    """

    def __init__(self, categories: int) -> None:
        self._of = np.zeros(categories, np.int64)
        self._bins = np.zeros(BINS, np.int64)
        self._R = np.zeros((1 + categories, BETS))
        self._since = np.zeros((1 + categories, BETS), np.int64)

    def add(
        self, category: int, distance: float, generator: np.random.Generator
    ) -> "NDArray[np.float64]":
        """One frame: its category and its squared distance over the number of features.

        Gives the p-values (1 + categories,), the distance's first.
        """
        n, k = int(self._of.sum()), self._of
        u = generator.random(1 + len(k))
        place = _DISTANCE.bin(distance)
        above, equal = self._bins[place + 1 :].sum(), self._bins[place]
        is_it = np.arange(len(k)) == category
        of_label = np.where(is_it, u[1:] * (k + 1), k + u[1:] * (n - k + 1))
        p = np.concatenate([[above + u[0] * (equal + 1)], of_label]) / (n + 1)
        self._R = np.minimum((self._R + 1) * bets(p), HIGHEST)
        self._since = np.where(self._R < 10, 0, self._since + 1)
        self._bins[place] += 1
        self._of[category] += 1
        return p

    def level(self) -> "NDArray[np.float64]":
        """Evidence of outliers and of labels (2,)."""
        return np.array([self._R[0].mean(), self._R[1:].mean()])

    def rising(self) -> int:
        """The category that most evidence says comes more often than before."""
        return int(self._R[1:].mean(axis=1).argmax())

    def started(self, name: str) -> int:
        """How many frames ago the strongest bet of `outliers` or `labels` began to win."""
        row = 0 if name == "outliers" else 1 + self.rising()
        return int(self._since[row][self._R[row].argmax()])

    def clear_labels(self) -> None:
        """Start `labels` anew, and leave `outliers` what it has."""
        self._R[1:] = 0.0
        self._since[1:] = 0

    def clear(self) -> None:
        """Start anew; what the line has shown is kept."""
        self._R[:] = 0.0
        self._since[:] = 0
