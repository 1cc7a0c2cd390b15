"""Draw one picture of every class (columns) on every surface (rows), as the README shows it.

python examples/factory_line/contact_sheet.py examples/factory_line/classes.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from canvas import SIDE
from generate import LABELS, draw_on
from surfaces import SURFACES

_HEADING = 16  # pixels


def contact_sheet() -> Image.Image:
    """Classes from left to right, surfaces from top to bottom, each cell from its own seed."""
    sheet = Image.new("RGB", (SIDE * len(LABELS), _HEADING + SIDE * len(SURFACES)), "white")
    text = ImageDraw.Draw(sheet)
    for column, label in enumerate(LABELS):
        text.text((column * SIDE + 4, 2), label, fill="black")
        for row, surface in enumerate(SURFACES):
            cell = draw_on(surface, label, rng=np.random.default_rng([7, row, column]))
            sheet.paste(Image.fromarray(cell), (column * SIDE, _HEADING + row * SIDE))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path, help="PNG file to write")
    path = parser.parse_args().path
    contact_sheet().quantize(256, kmeans=2).save(path, optimize=True)


if __name__ == "__main__":
    main()
