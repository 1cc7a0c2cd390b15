"""Make the drift reference with the engine that will run, over the images it was checked on."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge.drift.reference import (
    ReferenceNote,
    Seen,
    build_reference,
    gather,
    save_reference,
)
from lpvit_edge.errors import DataError
from lpvit_edge.features import FEATURES
from lpvit_edge.files import sha256_of
from lpvit_edge.images import ImageFolder, Preprocess, preprocessed, read_pixels
from lpvit_edge.progress import say, track

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lpvit_engines import Engine


def write_reference(
    onnx: Path,
    *,
    calibration: ImageFolder,
    heldout: ImageFolder,
    preprocess: Preprocess,
    engine: str,
    threads: int,
    precision: str = "default",
    name: str = "reference",
) -> ReferenceNote | None:
    """Write NAME.json and NAME.safetensors beside an ONNX file.

    None, said on stderr, where the model has no embedding to watch or the images are too few: the
    line then runs without a drift watch. A reference of an earlier model is removed.
    """
    from lpvit_engines import load_engine

    for suffix in ("json", "safetensors"):
        (onnx.parent / f"{name}.{suffix}").unlink(missing_ok=True)
    with load_engine(engine, onnx, threads=threads, precision=precision) as loaded:
        if FEATURES not in loaded.outputs:
            say(f"no drift reference: {onnx.name} has no output {FEATURES!r}")
            return None
        try:
            seen = tuple(
                _seen(loaded, images, preprocess, what=onnx.stem)
                for images in (calibration, heldout)
            )
            reference, shrinkage = build_reference(*seen)
        except DataError as error:
            say(f"no drift reference: {error}")
            return None
    return save_reference(
        reference,
        onnx.parent,
        onnx_sha256=sha256_of(onnx),
        engine=engine,
        images=(len(seen[0].features), len(seen[1].features)),
        shrinkage=shrinkage,
        name=name,
    )


def _seen(engine: "Engine", images: ImageFolder, preprocess: Preprocess, *, what: str) -> Seen:
    what = f"check: drift reference of {what}, {images.folder.name}"
    return gather(track(_frames(engine, images, preprocess), what=what, total=len(images.paths)))


def _frames(
    engine: "Engine", images: ImageFolder, preprocess: Preprocess
) -> "Iterator[tuple[NDArray[np.uint8], dict[str, NDArray[np.float32]]]]":
    for path in images.paths:
        try:
            pixels = read_pixels(path)
        except DataError:
            continue  # the check before has named it
        yield pixels, engine.infer_all(preprocessed(pixels, preprocess)[None])
