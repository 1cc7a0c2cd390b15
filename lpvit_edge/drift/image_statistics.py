"""Five numbers of a picture that tell a dying lamp from a loose lens from another material.

A lamp that dims takes brightness and leaves contrast (which is relative) and colour; a lens that
loses focus takes sharpness alone; another material changes several at once.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

STATISTICS = ("brightness", "contrast", "sharpness", "redness", "blueness")
_TILE = 64
_TILES_A_SIDE = 3
_SMALL = 256
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_LEAST_VARIANCE = 1e-6  # of a picture in 0..1: a quarter of one grey level


def image_statistics(image: "NDArray[np.uint8]") -> "NDArray[np.float32]":
    """The numbers named in STATISTICS, (5,), of a picture (height, width, 3) RGB.

    brightness: mean luma, 0..1. contrast: its standard deviation over its mean. sharpness: mean
    squared Laplacian over the variance, so that it does not follow contrast. redness, blueness:
    the channel's share of the light. At most 9 tiles of 64 pixels are looked at in a
    large picture, at full resolution: shrinking it would hide the blur.
    """
    tiles = [tile.astype(np.float32) / np.float32(255) for tile in _tiles(image)]
    lumas = [np.asarray(tile @ _LUMA, np.float32) for tile in tiles]
    weights = np.array([luma.size for luma in lumas], np.float64)
    mean = float(np.average([luma.mean() for luma in lumas], weights=weights))
    square = float(np.average([np.square(luma - mean).mean() for luma in lumas], weights=weights))
    laplacian = float(np.average([_laplacian_power(luma) for luma in lumas], weights=weights))
    light = np.average([tile.mean(axis=(0, 1)) for tile in tiles], axis=0, weights=weights)
    total = max(float(light.sum()), 1e-6)
    return np.array(
        [
            mean,
            np.sqrt(square) / max(mean, 1e-3),
            laplacian / max(square, _LEAST_VARIANCE),
            light[0] / total,
            light[2] / total,
        ],
        np.float32,
    )


def _tiles(image: "NDArray[np.uint8]") -> "list[NDArray[np.uint8]]":
    """The whole picture where it is small, otherwise a grid of tiles spread over it."""
    height, width = image.shape[:2]
    if max(height, width) <= _SMALL:
        return [image]
    return [
        image[top : top + _TILE, left : left + _TILE]
        for top in _starts(height)
        for left in _starts(width)
    ]


def _starts(length: int) -> "NDArray[np.int64]":
    count = min(_TILES_A_SIDE, max(1, length // _TILE))
    return np.linspace(0, max(0, length - _TILE), count).astype(np.int64)


def _laplacian_power(luma: "NDArray[np.float32]") -> float:
    """Mean square of the four-neighbour Laplacian inside the borders; 0 for a sliver."""
    if min(luma.shape) < 3:
        return 0.0
    centre = luma[1:-1, 1:-1]
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.square(around - 4 * centre).mean())
