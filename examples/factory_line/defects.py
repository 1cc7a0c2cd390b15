"""What goes wrong on a surface: each function takes a good part and returns a bad one.

`light` is the direction the light comes from, in radians: whatever has a relief is brighter on
that side. Sizes are in pixels of a SIDE x SIDE picture.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from canvas import (
    SIDE,
    Picture,
    Plane,
    Point,
    filtered_noise,
    rotated_grid,
    soft_step,
    stroke_mask,
)

Numbers = npt.NDArray[np.float64]
Defect = Callable[[Picture, np.random.Generator, float], Picture]


def scratch(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """A nearly straight groove: a bright flank beside a dark one."""
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(38, 75)
    bend = rng.uniform(-2.5, 2.5)
    middle = _somewhere(rng, margin=28)
    along = np.linspace(-0.5, 0.5, 9)
    points = _placed(along * length, bend * (1 - 4 * along**2), angle=angle, centre=middle)
    width = rng.uniform(1.1, 1.8)
    shift_x, shift_y = -np.sin(angle) * 1.1, np.cos(angle) * 1.1
    flank = [(x + shift_x, y + shift_y) for x, y in points]
    lit, dark = stroke_mask([(points, width)]), stroke_mask([(flank, width)])
    return _lightened(_darkened(picture, dark, by=0.35), lit, by=rng.uniform(0.55, 0.8))


def crack(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """A dark jagged line with branches that thins towards its ends."""
    angle = rng.uniform(0, 2 * np.pi)
    middle = _somewhere(rng, margin=28)
    ahead = _jagged(rng, middle, angle, steps=10)
    behind = _jagged(rng, middle, angle + np.pi, steps=10)
    trunk = [*reversed(behind[1:]), *ahead]
    width = rng.uniform(1.4, 2.1)
    strokes: list[tuple[list[Point], float]] = [(trunk, width)]
    for start in rng.choice(np.arange(4, len(trunk) - 4), size=3, replace=False):
        side = rng.choice([-1, 1]) * rng.uniform(0.6, 1.1)
        strokes.append((_jagged(rng, trunk[start], angle + side, steps=5), width * 0.65))
    return _darkened(picture, stroke_mask(strokes), by=rng.uniform(0.6, 0.8))


def fibre(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """A curled textile fibre of a vivid colour, with a faint shadow."""
    steps = 48
    turn = np.cumsum(rng.normal(0, 0.02, steps)) + rng.choice([-1, 1]) * rng.uniform(0.14, 0.24)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(turn)
    x, y = np.cumsum(1.9 * np.cos(heading)), np.cumsum(1.9 * np.sin(heading))
    points = _placed(x - x.mean(), y - y.mean(), angle=0, centre=_somewhere(rng, margin=30))
    width = rng.uniform(1.3, 1.9)
    shadow = [(px - 1.5 * np.cos(light), py - 1.5 * np.sin(light)) for px, py in points]
    shaded = _darkened(picture, stroke_mask([(shadow, width)]), by=0.2)
    thread = stroke_mask([(points, width)])[..., None] * np.float32(rng.uniform(0.7, 0.9))
    dye = 0.5 + 0.5 * np.cos(rng.uniform(0, 2 * np.pi) + np.array([0, 2, 4]) * np.pi / 3)
    return (shaded * (1 - thread) + dye * thread).astype(np.float32)


def dent(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """A smooth hollow: the flank away from the light is bright, the other in shade."""
    radius = rng.uniform(8, 14)
    u, v = rotated_grid(light, centre=_somewhere(rng, margin=22))
    stretch = rng.uniform(0.8, 1.25)
    bowl = np.exp(-0.5 * ((u / radius) ** 2 + (v / (radius * stretch)) ** 2) * 1.6)
    shade = -(u / radius) * bowl * np.float32(rng.uniform(0.6, 0.9))
    return _shaded(picture, shade)


def hole(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """A pit with a sharp border: nearly black, its far rim catching the light."""
    radius = rng.uniform(4, 7.5)
    u, v = rotated_grid(light, centre=_somewhere(rng, margin=14))
    rough = filtered_noise(rng, along=3, across=3)
    distance = np.hypot(u, v * np.float32(rng.uniform(0.85, 1.2))) - radius + 0.5 * rough
    rim = np.exp(-0.5 * ((distance - 1) / 1.1) ** 2) * np.clip(-u / radius, 0, 1)
    pit = soft_step(distance.astype(np.float32), softness=1.2)
    return _darkened(_lightened(picture, rim, by=0.6), pit, by=rng.uniform(0.75, 0.9))


def stain(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """A dried liquid: an irregular darker area with a still darker, sharp edge."""
    distance = _blotch(rng, radius=rng.uniform(10, 17), roughness=3.2)
    inside = soft_step(distance, softness=1.5)
    edge = np.exp(-0.5 * ((distance + 1.2) / 1.2) ** 2)
    amount = rng.uniform(0.22, 0.34)
    return _darkened(_darkened(picture, inside, by=amount), edge, by=amount)


def discolouration(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """An area of another hue and the same brightness, without a border."""
    inside = soft_step(_blotch(rng, radius=rng.uniform(15, 23), roughness=3), softness=9)
    hue = rng.uniform(0, 2 * np.pi)
    shift = np.cos(hue + np.array([0, 2, 4]) * np.pi / 3) * rng.uniform(0.16, 0.28)
    return (picture * (1 + inside[..., None] * shift)).astype(np.float32)


def speckle(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """Dust: many tiny dark grains, strewn about one place."""
    count = int(rng.integers(22, 45))
    middle = np.array(_somewhere(rng, margin=26))
    grains = middle + rng.normal(0, rng.uniform(9, 14), (count, 2))
    sizes = rng.uniform(0.6, 1.15, count)
    covered = _discs(grains, sizes)
    return _darkened(picture, covered, by=rng.uniform(0.6, 0.8))


def spatter(picture: Picture, rng: np.random.Generator, light: float) -> Picture:
    """A few beads of weld: bright towards the light, a shadow behind each."""
    count = int(rng.integers(4, 9))
    middle = np.array(_somewhere(rng, margin=28))
    beads = middle + rng.normal(0, 14, (count, 2))
    sizes = rng.uniform(1.9, 3.3, count)
    towards = np.array([np.cos(light), np.sin(light)])
    shadow = _discs(beads - towards * 1.8, sizes)
    body = _discs(beads, sizes)
    gleam = _discs(beads + towards * sizes[:, None] * 0.35, sizes * 0.5)
    shaded = _darkened(picture, shadow, by=0.55)
    covered = _lightened(_darkened(shaded, body, by=0.3), body, by=0.35)
    return _lightened(covered, gleam, by=0.8)


DEFECTS: dict[str, Defect] = {
    "crack": crack,
    "dent": dent,
    "discolouration": discolouration,
    "fibre": fibre,
    "hole": hole,
    "scratch": scratch,
    "spatter": spatter,
    "speckle": speckle,
    "stain": stain,
}


def _somewhere(rng: np.random.Generator, *, margin: float) -> Point:
    return float(rng.uniform(margin, SIDE - margin)), float(rng.uniform(margin, SIDE - margin))


def _placed(u: Numbers, v: Numbers, *, angle: float, centre: Point) -> list[Point]:
    cosine, sine = np.cos(angle), np.sin(angle)
    x, y = centre[0] + u * cosine - v * sine, centre[1] + u * sine + v * cosine
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _jagged(rng: np.random.Generator, start: Point, angle: float, *, steps: int) -> list[Point]:
    """A line of short straight pieces, each turned at random about one direction."""
    heading = angle + rng.uniform(-0.9, 0.9, steps)
    length = rng.uniform(1.8, 3.6, steps)
    x = np.cumsum(length * np.cos(heading))
    y = np.cumsum(length * np.sin(heading))
    return [start, *_placed(x, y, angle=0, centre=start)]


def _blotch(rng: np.random.Generator, *, radius: float, roughness: float) -> Plane:
    """Signed distance, about, to an irregular closed border; negative inside."""
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(0.75, 1.3)
    u, v = rotated_grid(turn, centre=_somewhere(rng, margin=24))
    border = filtered_noise(rng, along=5, across=5)
    distance = np.hypot(u * stretch, v / stretch) - radius + roughness * border
    result: Plane = distance.astype(np.float32)
    return result


def _discs(centres: Numbers, radii: Numbers) -> Plane:
    """Coverage of discs: centres (n, 2) and radii (n,) in pixels."""
    axis = np.arange(SIDE, dtype=np.float32)
    x = (axis[None, :] - centres[:, :1]) ** 2
    y = (axis[None, :] - centres[:, 1:]) ** 2
    distance = np.sqrt(y[:, :, None] + x[:, None, :]) - radii[:, None, None]
    result: Plane = np.clip(0.5 - distance, 0, 1).max(axis=0).astype(np.float32)
    return result


def _darkened(picture: Picture, mask: Plane, *, by: float) -> Picture:
    result: Picture = (picture * (1 - np.float32(by) * mask[..., None])).astype(np.float32)
    return result


def _lightened(picture: Picture, mask: Plane, *, by: float) -> Picture:
    result: Picture = (picture + (1 - picture) * np.float32(by) * mask[..., None]).astype(
        np.float32
    )
    return result


def _shaded(picture: Picture, shade: Plane) -> Picture:
    result: Picture = (picture * (1 + shade[..., None])).astype(np.float32)
    return result
