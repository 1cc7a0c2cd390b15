"""Write the factory line's images: class folders of PNG files, the same for the same seed.

python examples/factory_line/generate.py --out data/factory_line --calibration 512 --heldout 2000
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from canvas import SIDE, Picture, blurred, rotated_grid
from defects import DEFECTS
from surfaces import SURFACES, printed

LABELS: tuple[str, ...] = tuple(sorted([*DEFECTS, "ok"]))
SPLITS: tuple[str, ...] = ("train", "calibration", "heldout")
DEFAULT_SEED = 20240707


def draw(label: str, *, split: str, index: int, seed: int = DEFAULT_SEED) -> npt.NDArray[np.uint8]:
    """One image (SIDE, SIDE, 3) of a class; it depends on nothing but the four arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    surface = list(SURFACES)[int(rng.integers(len(SURFACES)))]
    return draw_on(surface, label, rng=rng)


def draw_on(
    surface: str, label: str, *, rng: np.random.Generator, lamp: float = 1.0, defocus: float = 0.0
) -> npt.NDArray[np.uint8]:
    """One image (SIDE, SIDE, 3) of a class on a given surface.

    `lamp` is the share of the light that is left, `defocus` the blur in pixels of a loose lens.
    """
    angle = float(rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.12))
    light = float(rng.uniform(0, 2 * np.pi))
    picture = SURFACES[surface](rng, angle)
    if rng.random() < 0.35:
        picture = printed(picture, rng, angle)
    if label != "ok":
        picture = DEFECTS[label](picture, rng, light)
    return photographed(picture, rng, light, lamp=lamp, defocus=defocus)


def label_of(index: int) -> str:
    """The class of the image of that number: the classes take turns, so every split balances."""
    return LABELS[index % len(LABELS)]


def photographed(
    picture: Picture,
    rng: np.random.Generator,
    light: float,
    *,
    lamp: float = 1.0,
    defocus: float = 0.0,
) -> npt.NDArray[np.uint8]:
    """The part under an uneven light, through a lens, on a sensor; see draw_on."""
    towards, across = rotated_grid(light)
    radius = np.hypot(towards, across) / SIDE
    falloff = 1 + rng.uniform(0, 0.3) * towards / SIDE - rng.uniform(0, 0.35) * radius**2
    exposure, white_balance = rng.uniform(0.8, 1.15), rng.uniform(0.97, 1.03, 3)
    exposed = picture * (falloff[..., None] * (exposure * lamp) * white_balance)
    sigma = float(np.hypot(rng.uniform(0.2, 0.6), defocus))
    sharp = blurred(exposed.astype(np.float32), sigma=sigma)
    noise = rng.standard_normal(sharp.shape, dtype=np.float32) * rng.uniform(0.006, 0.02)
    return np.clip((sharp + noise) * 255 + 0.5, 0, 255).astype(np.uint8)


def write_split(out: Path, split: str, count: int, *, seed: int = DEFAULT_SEED) -> None:
    """Write images 0 .. count - 1 of a split as <out>/<split>/<class>/<number>.png."""
    for label in LABELS:
        (out / split / label).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        label = label_of(index)
        image = Image.fromarray(draw(label, split=split, index=index, seed=seed))
        image.save(out / split / label / f"{index:06d}.png", compress_level=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the splits into")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    for split, count in zip(SPLITS, (0, 512, 2000), strict=True):
        parser.add_argument(f"--{split}", type=int, default=count, help=f"images (default {count})")
    arguments = parser.parse_args()
    for split in SPLITS:
        count = getattr(arguments, split)
        if count:
            write_split(arguments.out, split, count, seed=arguments.seed)
            print(f"{count} images in {arguments.out / split}")


if __name__ == "__main__":
    main()
