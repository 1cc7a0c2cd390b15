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
from lpvit_edge.drift.past import Past

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAMES = ("outliers", "labels")
_DISTANCE = CHANNELS[0]
# A class that was seen in a share t of the frames comes a times as often: of its p-values, which
# lie below t, there are a times as many. A bet is a below t and (1 - a t) / (1 - t) above.
_TIMES, _BELOW = (
    grid.ravel()
    for grid in np.meshgrid([1.5, 3.0, 6.0], [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1])
)
_ABOVE = (1 - _TIMES * _BELOW) / (1 - _BELOW)


def label_bets(p: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """What one unit staked on each bet becomes: p (categories,) -> (categories, 21), mean 1."""
    return np.where(p[:, None] < _BELOW, _TIMES, _ABOVE)


class OwnPast:
    """Shiryaev-Roberts e-detectors as in evidence.Evidence; `labels` is the mean over categories.

    The p-value of a category is that of "this frame is of it": (u (k + 1)) / (n + 1) where it is,
    and (k + u (n - k + 1)) / (n + 1) where it is not, with k of n frames before, u uniform. It is
    uniform while frames are exchangeable, and small where a rare category comes again and again.
    """

    def __init__(self, categories: int) -> None:
        self._of = np.zeros(categories, np.int64)
        self._bins = np.zeros(BINS, np.int64)
        self._outliers = np.zeros((1, BETS))
        self._labels = np.zeros((categories, len(_BELOW)))
        self._since = [np.zeros(R.shape, np.int64) for R in (self._outliers, self._labels)]

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
        self._outliers = np.minimum((self._outliers + 1) * bets(p[:1]), HIGHEST)
        self._labels = np.minimum((self._labels + 1) * label_bets(p[1:]), HIGHEST)
        both = zip((self._outliers, self._labels), self._since, strict=True)
        self._since = [np.where(R < 10, 0, since + 1) for R, since in both]
        self._bins[place] += 1
        self._of[category] += 1
        return p

    def level(self) -> "NDArray[np.float64]":
        """Evidence of outliers and of labels (2,)."""
        return np.array([self._outliers.mean(), self._labels.mean()])

    def rising(self) -> int:
        """The category that most evidence says comes more often than before."""
        return int(self._labels.mean(axis=1).argmax())

    def started(self, name: str) -> int:
        """How many frames ago the strongest bet of `outliers` or `labels` began to win."""
        if name == "outliers":
            return int(self._since[0][0][self._outliers[0].argmax()])
        row = self.rising()
        return int(self._since[1][row][self._labels[row].argmax()])

    def past(self) -> Past:
        """Frames by category (categories,) and by distance (BINS,)."""
        return {"of": self._of, "distances": self._bins}

    def remember(self, past: Past) -> None:
        """Go on from what past() gave."""
        self._of[:], self._bins[:] = past["of"], past["distances"]

    def clear_labels(self) -> None:
        """Start `labels` anew, and leave `outliers` what it has."""
        self._labels[:] = 0.0
        self._since[1][:] = 0

    def clear(self) -> None:
        """Start anew; what the line has shown is kept."""
        self._outliers[:] = 0.0
        self._since[0][:] = 0
        self.clear_labels()
