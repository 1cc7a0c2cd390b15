"""What surfaces and defects are drawn with: grids, filtered noise and anti-aliased masks.

Everything is a float32 array of SIDE x SIDE pixels (x to the right, y down) and takes the
random generator it draws from, so that an image depends on its own seed alone.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

SIDE = 96
_SUPERSAMPLING = 4

Plane = npt.NDArray[np.float32]  # (SIDE, SIDE)
Picture = npt.NDArray[np.float32]  # (SIDE, SIDE, 3), linear in 0..1
Point = tuple[float, float]  # (x, y) in pixels

_Y, _X = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
_FREQUENCY_Y = np.fft.fftfreq(SIDE)[:, None]
_FREQUENCY_X = np.fft.rfftfreq(SIDE)[None, :]


def rotated_grid(angle: float, *, centre: Point = (SIDE / 2, SIDE / 2)) -> tuple[Plane, Plane]:
    """Coordinates (along, across) of every pixel about a centre, the axes turned by an angle."""
    x, y = _X - np.float32(centre[0]), _Y - np.float32(centre[1])
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def filtered_noise(
    rng: np.random.Generator, *, along: float, across: float, angle: float = 0.0
) -> Plane:
    """Gaussian noise blurred by `along` and `across` pixels; mean 0, standard deviation 1."""
    white = np.fft.rfft2(rng.standard_normal((SIDE, SIDE), dtype=np.float32))
    cosine, sine = np.cos(angle), np.sin(angle)
    u = _FREQUENCY_X * cosine + _FREQUENCY_Y * sine
    v = _FREQUENCY_Y * cosine - _FREQUENCY_X * sine
    response = np.exp(-2 * np.pi**2 * ((along * u) ** 2 + (across * v) ** 2))
    noise = np.fft.irfft2(white * response, s=(SIDE, SIDE))
    noise -= noise.mean()
    result: Plane = (noise / noise.std()).astype(np.float32)
    return result


def blurred(picture: Picture, *, sigma: float) -> Picture:
    """A picture through a Gaussian of `sigma` pixels, mirrored at its borders."""
    radius = max(2, math.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        width = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(picture, width, mode="reflect")
        parts = [padded.take(range(k, k + SIDE), axis=axis) * tap for k, tap in enumerate(taps)]
        picture = np.stack(parts).sum(axis=0, dtype=np.float32)
    return picture


def soft_step(distance: Plane, *, softness: float) -> Plane:
    """1 where a signed distance is well below 0, 0 well above, over about `softness` pixels."""
    clipped = np.clip(distance / np.float32(softness), -20, 20)
    step: Plane = (1 / (1 + np.exp(4 * clipped))).astype(np.float32)
    return step


def stroke_mask(strokes: Sequence[tuple[Sequence[Point], float]]) -> Plane:
    """Coverage 0..1 of polylines, each (points, width in pixels), anti-aliased."""
    side = SIDE * _SUPERSAMPLING
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for points, width in strokes:
        scaled = [(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in points]
        draw.line(scaled, fill=255, width=max(1, round(width * _SUPERSAMPLING)), joint="curve")
    return _downsampled(image)


def polygon_mask(polygons: Sequence[Sequence[Point]]) -> Plane:
    """Coverage 0..1 of filled polygons, anti-aliased."""
    side = SIDE * _SUPERSAMPLING
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for points in polygons:
        draw.polygon([(x * _SUPERSAMPLING, y * _SUPERSAMPLING) for x, y in points], fill=255)
    return _downsampled(image)


def _downsampled(image: Image.Image) -> Plane:
    covered = np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32)
    return covered / np.float32(255)
