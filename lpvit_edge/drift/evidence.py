"""From scores to evidence of change with a stated rate of false alarms.

Each frame's score is ranked among scores of the same kind of frame, which gives a p-value, and a
bet against that p-value multiplies the evidence: a Shiryaev-Roberts e-detector. While nothing has
changed, R_n - n is a martingale, so the mean number of frames until R reaches c is at least c,
however often one looks (Shin, Ramdas, Rinaldo, "E-detectors: a nonparametric framework for
sequential change detection", 2022; Vovk et al., "Retrain or not retrain: conformal test
martingales for change-point detection", 2021).

Two ways of ranking, because each is blind where the other sees:

* against everything the line has shown so far (conformal, smoothed; exact). It knows the line
  itself and finds small sudden changes, but a slow one becomes its new normal.
* against the reference alone, with p-values enlarged until they hold for all ranks at once with
  confidence 1 - delta over the choice of the reference images. It never forgets, so it finds slow
  changes, and it needs a larger one to say so.
"""

from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 1024
# P-values as small as the reference can show are rare: (share of frames that are strange, how
# strange); a bet is 1 - w + w * e * p^(e - 1). Share 1 finds a change of all frames, 0.03 of a few.
_SHARES = np.array([0.03, 0.2, 1.0])
_POWERS = np.array([0.15, 0.4, 0.7])
_W, _E = (grid.ravel() for grid in np.meshgrid(_SHARES, _POWERS, indexing="ij"))
BETS = len(_W)
_LEAST_P = 1e-9
HIGHEST = 1e18


class Channel(msgspec.Struct, frozen=True, kw_only=True):
    """One score of a frame, binned evenly between two ends; beyond them it counts as the end.

    With `both` a low score is as strange as a high one.
    """

    name: str
    low: float
    high: float
    both: bool = True
    is_log: bool = False

    def bin(self, score: float) -> int:
        value = np.log10(max(score, 1e-30)) if self.is_log else score
        place = (value - self.low) / (self.high - self.low) * BINS
        return int(min(max(place, 0), BINS - 1))


CHANNELS = (
    Channel(name="embedding", low=-2, high=4, both=False, is_log=True),  # distance per feature
    Channel(name="doubt", low=-9, high=0, both=False, is_log=True),  # 1 - confidence
    Channel(name="brightness", low=0, high=1),
    Channel(name="contrast", low=-3, high=1, is_log=True),
    Channel(name="sharpness", low=-3, high=2, is_log=True),
    Channel(name="redness", low=0, high=1),
    Channel(name="blueness", low=0, high=1),
)
_BOTH = np.array([channel.both for channel in CHANNELS])


def bins_of(scores: "NDArray[np.floating]") -> "NDArray[np.int64]":
    """The bin of each channel's score (channels,)."""
    return np.array(
        [channel.bin(float(score)) for channel, score in zip(CHANNELS, scores, strict=True)]
    )


def smoothed_p(
    counts: "NDArray[np.integer]", bins: "NDArray[np.int64]", u: "NDArray[np.float64]"
) -> "NDArray[np.float64]":
    """P-value of a high score in each channel: counts (channels, BINS), bins and u (channels,).

    (#above + u (#equal + 1)) / (n + 1) with u uniform: uniform itself, and independent from frame
    to frame, while frames are exchangeable (Vovk, Gammerman, Shafer, "Algorithmic Learning in a
    Random World", 2005, on smoothed conformal predictors).
    """
    rows = np.arange(len(bins))
    cumulated = np.cumsum(counts, axis=1)
    n, up_to = cumulated[:, -1], cumulated[rows, bins]
    p = (n - up_to + u * (counts[rows, bins] + 1)) / (n + 1)
    return np.asarray(p, np.float64)


def rank_bounds(n: int, *, delta: float) -> "NDArray[np.float64]":
    """Upper bound of the true P(score >= s) by the number of n reference scores that are >= s.

    (n + 1,), all at once with confidence 1 - delta. The (r + 1)th smallest of n uniform numbers
    exceeds x with probability P(Bin(n, x) <= r) <= exp(-n kl(r / n, x)) (Chernoff); each rank
    gets delta / n. With no image at all the bound is 1: nothing is known.
    """
    if n == 0:
        return np.ones(1)
    r = np.arange(n) / n
    low, high = r.copy(), np.ones(n)
    target = np.log(n / delta) / n
    for _ in range(60):
        middle = (low + high) / 2
        too_small = _kl(r, middle) < target
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)
    return np.append(high, 1.0)


def _kl(a: "NDArray[np.float64]", b: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Divergence of Bernoulli(a) from Bernoulli(b), for a <= b."""
    b = np.clip(b, 1e-12, 1 - 1e-12)
    first = np.where(a > 0, a * np.log(np.maximum(a, 1e-12) / b), 0.0)
    return np.asarray(first + (1 - a) * np.log(np.maximum(1 - a, 1e-12) / (1 - b)))


def bets(p: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """What one unit staked on each bet becomes: p (channels,) -> (channels, BETS), mean 1."""
    p = np.maximum(p, _LEAST_P)[:, None]
    return np.asarray(1 - _W + _W * _E * p ** (_E - 1))


class Evidence:
    """The e-detectors of all channels.

    R is (channels, 4, BETS): against all seen and against the reference, high and low scores.
    `level()` is their mean in each channel, itself an e-detector: a change of unknown kind.
    """

    def __init__(self) -> None:
        self._R = np.zeros((len(CHANNELS), 4, BETS))
        self._since = np.zeros((len(CHANNELS), 4, BETS), np.int64)

    def add(
        self,
        p_seen: "NDArray[np.float64]",
        p_high: "NDArray[np.float64]",
        p_low: "NDArray[np.float64]",
    ) -> None:
        """One frame: p-values of high scores against all seen, and bounds for high and for low."""
        stakes = np.stack([bets(p_seen), bets(1 - p_seen), bets(p_high), bets(p_low)], axis=1)
        self._R = np.minimum((self._R + 1) * stakes, HIGHEST)
        self._R[~_BOTH, 1::2] = 0.0  # nobody is alarmed by a frame that is too usual
        self._since = np.where(self._R < 10, 0, self._since + 1)

    def level(self) -> "NDArray[np.float64]":
        """Evidence of each channel (channels,): the mean over its bets."""
        sides = np.where(_BOTH, 4, 2)
        return np.asarray(self._R.sum(axis=(1, 2)) / (sides * BETS))

    def started(self, channel: int) -> int:
        """How many frames ago the strongest bet of a channel began to win."""
        strongest = np.unravel_index(np.argmax(self._R[channel]), self._R[channel].shape)
        return int(self._since[channel][strongest])

    def clear(self) -> None:
        """Start anew, after an alarm or a changeover."""
        self._R[:] = 0.0
        self._since[:] = 0
