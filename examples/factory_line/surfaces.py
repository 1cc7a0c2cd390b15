"""The materials of the parts, and the print that good parts carry too."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from canvas import SIDE, Picture, Point, filtered_noise, polygon_mask, rotated_grid

Tint = npt.NDArray[np.float64]  # (3,) gains of red, green, blue
Surface = Callable[[np.random.Generator, float], Picture]


def brushed_metal(rng: np.random.Generator, angle: float) -> Picture:
    """Steel with fine parallel brush marks along `angle`."""
    marks = filtered_noise(rng, along=14, across=0.5, angle=angle)
    bands = filtered_noise(rng, along=40, across=5, angle=angle)
    tint = np.array([1.0, 1.0, 1.03]) + rng.uniform(-0.02, 0.02, 3)
    return _coloured(rng.uniform(0.45, 0.65) + 0.045 * marks + 0.025 * bands, tint)


def woven_fabric(rng: np.random.Generator, angle: float) -> Picture:
    """Plain weave: warp and weft threads take turns on top, each with its own shade."""
    u, v = rotated_grid(angle)
    pitch = rng.uniform(4.5, 7.0)
    column, row = np.floor(u / pitch), np.floor(v / pitch)
    warp_on_top = (column + row) % 2 == 0
    across = np.where(warp_on_top, u / pitch - column, v / pitch - row)
    thread = np.where(warp_on_top, column, row + 200).astype(np.int64) % 400
    shade = rng.normal(0, 0.03, 400)[thread]
    height = np.sin(np.pi * across) * (0.9 + 0.1 * warp_on_top)
    fuzz = filtered_noise(rng, along=0.7, across=0.7)
    level = rng.uniform(0.75, 0.95) * (0.62 + 0.3 * height + shade) + 0.02 * fuzz
    tint = _tint(rng, saturation=0.3)
    return _coloured(level, tint * 0.75)


def sand_casting(rng: np.random.Generator, angle: float) -> Picture:
    """Grey cast iron: grains of several sizes and shallow waves."""
    grain = filtered_noise(rng, along=0.8, across=0.8)
    lumps = filtered_noise(rng, along=2.2, across=2.2)
    waves = filtered_noise(rng, along=12, across=9, angle=angle)
    tint = np.array([1.02, 1.0, 0.97]) + rng.uniform(-0.03, 0.03, 3)
    return _coloured(rng.uniform(0.36, 0.52) + 0.04 * grain + 0.035 * lumps + 0.02 * waves, tint)


def planed_wood(rng: np.random.Generator, angle: float) -> Picture:
    """Year rings that wander along the board, with pores."""
    _, v = rotated_grid(angle)
    wander = filtered_noise(rng, along=26, across=10, angle=angle)
    phase = v / rng.uniform(5, 10) + rng.uniform(0.4, 0.9) * wander
    ring = (phase - np.floor(phase)) ** 2
    pores = filtered_noise(rng, along=6, across=0.5, angle=angle)
    level = rng.uniform(0.52, 0.68) - 0.13 * ring + 0.025 * pores
    return _coloured(level, np.array([1.22, 0.95, rng.uniform(0.55, 0.75)]))


def painted_plate(rng: np.random.Generator, angle: float) -> Picture:
    """Smooth coloured paint with a little orange peel."""
    peel = filtered_noise(rng, along=1.8, across=1.8)
    flow = filtered_noise(rng, along=20, across=20, angle=angle)
    level = rng.uniform(0.42, 0.66) + 0.012 * peel + 0.015 * flow
    return _coloured(level, _tint(rng, saturation=0.55))


SURFACES: dict[str, Surface] = {
    "brushed_metal": brushed_metal,
    "woven_fabric": woven_fabric,
    "sand_casting": sand_casting,
    "planed_wood": planed_wood,
    "painted_plate": painted_plate,
}


def printed(picture: Picture, rng: np.random.Generator, angle: float) -> Picture:
    """The part with a bar code, a line of characters or a frame in one ink: no defect."""
    shape = _PRINTS[int(rng.integers(len(_PRINTS)))]
    centre = (rng.uniform(20, SIDE - 20), rng.uniform(20, SIDE - 20))
    covered = polygon_mask([_turned(box, angle, centre) for box in shape(rng)])
    ink = rng.uniform(0.05, 0.2, 3) if rng.random() < 0.6 else rng.uniform(0.8, 0.95, 3)
    opacity = (covered * np.float32(rng.uniform(0.55, 0.85)))[..., None]
    inked = picture * (1 - opacity) + ink.astype(np.float32) * opacity
    return inked.astype(np.float32)


Box = tuple[float, float, float, float]  # left, top, right, bottom about the print's centre


def _bar_code(rng: np.random.Generator) -> list[Box]:
    edges = np.cumsum(rng.choice([1.0, 1.5, 2.5], 22)) - 18
    height = rng.uniform(5, 9)
    return [(a, -height, b, height) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _characters(rng: np.random.Generator) -> list[Box]:
    boxes: list[Box] = []
    for left in np.arange(-22, 20, 8.0):
        for row, column in np.argwhere(rng.random((5, 3)) < 0.6):
            x, y = left + 2.0 * column, 2.0 * row - 5
            boxes.append((x, y, x + 2.0, y + 2.0))
    return boxes


def _frame(rng: np.random.Generator) -> list[Box]:
    width, height = rng.uniform(10, 20), rng.uniform(8, 14)
    line = 1.6
    sides = [(-width, -height, width, line - height), (-width, height - line, width, height)]
    posts = [(-width, -height, line - width, height), (width - line, -height, width, height)]
    return [*sides, *posts]


_PRINTS = (_bar_code, _characters, _frame)


def _turned(box: Box, angle: float, centre: Point) -> list[Point]:
    left, top, right, bottom = box
    cosine, sine = np.cos(angle), np.sin(angle)
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return [
        (float(centre[0] + x * cosine - y * sine), float(centre[1] + x * sine + y * cosine))
        for x, y in corners
    ]


def _tint(rng: np.random.Generator, *, saturation: float) -> Tint:
    hue = rng.uniform(0, 2 * np.pi)
    strength = saturation * rng.uniform(0.3, 1)
    return 1 + strength * 0.5 * np.cos(hue + np.array([0, 2, 4]) * np.pi / 3)


def _coloured(level: npt.NDArray[np.floating], tint: Tint) -> Picture:
    return (level[..., None] * tint).astype(np.float32)
