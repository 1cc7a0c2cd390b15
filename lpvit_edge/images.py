"""Class folders of images, and the preprocessing that a model was trained with.

Preprocessing needs Pillow and numpy only, so that a device without torch does the same as the
workstation; a test holds it equal to timm's transform.
"""

import hashlib
import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.errors import DataError
from lpvit_edge.files import sha256_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Preprocess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Resize the short side, crop the centre, scale to 0..1, normalize per channel (RGB)."""

    image_size: Annotated[int, msgspec.Meta(ge=1)]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[_Positive, _Positive, _Positive] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
    crop_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0


class ImageFolder(msgspec.Struct, frozen=True, kw_only=True):
    """Image files and, when they lie in class folders, the index of each one's class."""

    folder: Path
    paths: tuple[Path, ...]
    targets: tuple[int, ...] | None


def scan_folder(folder: Path, *, labels: tuple[str, ...] | None) -> ImageFolder:
    """Find the images of a folder; with `labels`, its subfolders must be the model's classes.

    A folder without subfolders holds images without labels. Raises DataError when there is no
    image, or when a subfolder is none of the model's classes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give a folder with one subfolder per class")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        return ImageFolder(folder=folder, paths=_some(_images_in(folder), folder), targets=None)
    order = labels if labels is not None else tuple(classes)
    _refuse_unknown_classes(folder, classes, order)
    pairs = [(path, order.index(name)) for name in classes for path in _images_in(folder / name)]
    paths = _some([path for path, _ in pairs], folder)
    return ImageFolder(folder=folder, paths=paths, targets=tuple(target for _, target in pairs))


def class_names(folder: Path) -> tuple[str, ...] | None:
    """Names of a folder's class folders, sorted; None when it has none."""
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) or None


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _some(paths: list[Path], folder: Path) -> tuple[Path, ...]:
    if not paths:
        raise DataError(
            f"{folder}: no image in it ({', '.join(sorted(SUFFIXES))}); expected "
            "<folder>/<class>/<image>"
        )
    return tuple(paths)


def _refuse_unknown_classes(folder: Path, found: list[str], labels: tuple[str, ...]) -> None:
    unknown = [name for name in found if name not in labels]
    if unknown:
        raise DataError(
            f"{folder}: class folders {unknown} are none of the model's {len(labels)} classes "
            f"{list(labels)}; rename the folders or set `labels` in the model's TOML file"
        )


def take(images: ImageFolder, count: int) -> ImageFolder:
    """An evenly spread subset, so that every class stays represented."""
    total = len(images.paths)
    if count >= total:
        return images
    picked = [index * total // count for index in range(count)]
    targets = images.targets
    return ImageFolder(
        folder=images.folder,
        paths=tuple(images.paths[index] for index in picked),
        targets=None if targets is None else tuple(targets[index] for index in picked),
    )


def content_sha256(images: ImageFolder) -> str:
    """One digest of all files with their classes, independent of where they lie."""
    classes = images.targets or (-1,) * len(images.paths)
    pairs = zip(images.paths, classes, strict=True)
    digest = hashlib.sha256()
    for entry in sorted(f"{sha256_of(path)} {target}\n" for path, target in pairs):
        digest.update(entry.encode())
    return digest.hexdigest()


def overlap(a: ImageFolder, b: ImageFolder) -> tuple[Path, ...]:
    """Files of `a` whose content also occurs in `b`."""
    contents = {sha256_of(path) for path in b.paths}
    return tuple(path for path in a.paths if sha256_of(path) in contents)


def refuse_alike(images: ImageFolder, preprocess: Preprocess) -> None:
    """Raise DataError when every readable image shows the same pixels; reads until one differs."""
    first = None
    for path in images.paths:
        try:
            pixels = read_image(path, preprocess)
        except DataError:
            continue  # named when all images are read
        if first is None:
            first = pixels
        elif not np.array_equal(pixels, first):
            return
    if len(images.paths) > 1:
        raise DataError(
            f"{images.folder}: all {len(images.paths)} images are alike; take images as they come "
            "from the line, of every class"
        )


def read_image(path: Path, preprocess: Preprocess) -> "NDArray[np.float32]":
    """One image as (3, image_size, image_size) float32. Raises DataError for a corrupt file."""
    return preprocessed(read_pixels(path), preprocess)


def read_pixels(path: Path) -> "NDArray[np.uint8]":
    """One image as a camera would give it, (height, width, 3) RGB; DataError for a corrupt file."""
    return _decoded(path, name=str(path))


def decode_pixels(content: bytes, *, name: str) -> "NDArray[np.uint8]":
    """An encoded image as read_pixels gives it; `name` is what an error calls it."""
    return _decoded(BytesIO(content), name=name)


def _decoded(source: Path | BytesIO, *, name: str) -> "NDArray[np.uint8]":
    pillow = require("PIL.Image")
    try:
        with pillow.open(source) as image:
            return np.asarray(_eight_bit(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise DataError(f"{name}: not a readable image ({error})") from error


def preprocessed(pixels: "NDArray[np.uint8]", preprocess: Preprocess) -> "NDArray[np.float32]":
    """What the model reads, (3, image_size, image_size), of a picture (height, width, 3) RGB."""
    pixels = _resize(require("PIL.Image").fromarray(pixels), preprocess)
    mean, std = (np.asarray(values, np.float32) for values in (preprocess.mean, preprocess.std))
    scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)


def _eight_bit(image: Any) -> Any:
    """16-bit grey scaled to 8 bit: Pillow would cut it off at 255. ValueError for other depths."""
    if image.mode.startswith("I;16"):
        from PIL import Image

        grey = np.asarray(image, np.float32) / 257.0
        return Image.fromarray(grey.round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode!r}, more than 16 bits a pixel; save it with 8 or 16")
    return image


def _resize(image: "object", preprocess: Preprocess) -> "NDArray[np.uint8]":
    """Short side to image_size / crop_fraction, then the central square: (S, S, 3) uint8."""
    from PIL import Image

    assert isinstance(image, Image.Image)
    size = preprocess.image_size
    short = math.floor(size / preprocess.crop_fraction)
    scale = short / min(image.size)
    width, height = (max(short, int(side * scale)) for side in image.size)
    method = Image.Resampling[preprocess.interpolation.upper()]
    if image.size != (width, height):
        image = image.resize((width, height), method)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Images (n, 3, S, S) float32 with their classes, and the files that could not be read."""

    images: "NDArray[np.float32]"
    targets: "NDArray[np.int64] | None"
    skipped: tuple[str, ...]


def read_batches(images: ImageFolder, preprocess: Preprocess, *, size: int) -> Iterator[Batch]:
    """Read a folder in batches; a corrupt file is skipped and named in its batch."""
    for start in range(0, len(images.paths), size):
        yield _read(images, preprocess, range(start, min(start + size, len(images.paths))))


def _read(images: ImageFolder, preprocess: Preprocess, indices: range) -> Batch:
    good: list[NDArray[np.float32]] = []
    targets: list[int] = []
    skipped: list[str] = []
    for index in indices:
        try:
            good.append(read_image(images.paths[index], preprocess))
        except DataError as error:
            skipped.append(str(error))
            continue
        targets.append(-1 if images.targets is None else images.targets[index])
    size = preprocess.image_size
    stacked = np.stack(good) if good else np.empty((0, 3, size, size), np.float32)
    return Batch(
        images=stacked,
        targets=None if images.targets is None else np.asarray(targets, np.int64),
        skipped=tuple(skipped),
    )


def read_all(images: ImageFolder, preprocess: Preprocess) -> Batch:
    """Read a whole folder. Raises DataError when not one file can be read."""
    batch = _read(images, preprocess, range(len(images.paths)))
    if not len(batch.images):
        raise DataError(f"{images.folder}: none of {len(images.paths)} files is a readable image")
    return batch
