"""How sure a share of images is, and a difference between two models on the same images."""

import math
from statistics import NormalDist


def one_sided_z(confidence: float) -> float:
    """The standard normal quantile: 1.645 for 0.95."""
    return NormalDist().inv_cdf(confidence)


def wilson(correct: float, total: float, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); z for 95 %, two-sided."""
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (centre - half) / scale, (centre + half) / scale


def tango_upper(lost: float, won: float, total: float, *, z: float) -> float:
    """One-sided upper bound of the drop (lost - won) / total between paired proportions.

    `lost` images only the first model gets right, `won` only the second, of `total` that both saw.
    The score interval of Tango (Statistics in Medicine 17, 1998): at zero drop its statistic is
    McNemar's, and unlike Wald's it stays wide when few images differ.
    """
    low, high = (lost - won) / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        inside = _score(lost, won, total, middle) > -z
        low, high = (middle, high) if inside else (low, middle)
    return high


def _score(lost: float, won: float, total: float, drop: float) -> float:
    """Tango's statistic for a supposed drop; `q` is the share of won images that fits it best."""
    b = -lost - won + (2 * total - lost + won) * drop
    c = -won * drop * (1 - drop)
    q = (math.sqrt(max(b * b - 8 * total * c, 0.0)) - b) / (4 * total)
    variance = total * (2 * q + drop * (1 - drop))
    difference = lost - won - total * drop
    if variance <= 0.0:  # no image differs and no drop is supposed
        return 0.0 if difference == 0.0 else math.copysign(math.inf, difference)
    return difference / math.sqrt(variance)
