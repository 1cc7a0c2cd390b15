"""Golden frames: a few images with the answers that a bundle's engine gave when it was built.

They travel in the bundle as golden.zip, the image files as they were beside golden.json, so that
the device can prove that decoding, preprocessing and engine still answer the same.
"""

import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.errors import DataError, EngineError, FileFormatError
from lpvit_edge.images import Preprocess, decode_pixels, preprocessed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lpvit_engines import Engine

COUNT = 16
_LARGEST_BYTES = 64 << 20  # of one image file; more is no camera's frame


class GoldenFrame(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One image file's name in the archive, and the probabilities (classes,) it must give."""

    file: str
    probabilities: tuple[float, ...]


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How an engine answers the golden frames. `worst` is the largest |p - p at build|."""

    frames: int
    same_class: int
    worst: float

    @property
    def holds(self) -> bool:
        """Every frame has its class, and no probability moved by more than a rounding may."""
        return self.frames == self.same_class and self.worst <= TOLERANCE


TOLERANCE = 0.05  # processors round differently; another preprocessing moves far more


def softmax(logits: "NDArray[np.float32]") -> "NDArray[np.float64]":
    """Probabilities of logits (classes,)."""
    shifted = np.exp(logits.astype(np.float64) - float(logits.max()))
    return np.asarray(shifted / shifted.sum(), np.float64)


def probabilities_of(
    engine: "Engine", pixels: "NDArray[np.uint8]", preprocess: Preprocess
) -> "NDArray[np.float64]":
    """What the engine says of one image (height, width, 3): (classes,)."""
    return softmax(engine.infer(preprocessed(pixels, preprocess)[None])[0])


def golden_frames(
    paths: Sequence[Path], engine: "Engine", preprocess: Preprocess
) -> tuple[tuple[GoldenFrame, bytes], ...]:
    """Up to COUNT evenly spread images with the engine's answers; corrupt ones left out.

    Raises EngineError where an answer is not finite.
    """
    step = max(1, len(paths) // COUNT)
    found = []
    for number, path in enumerate(paths[::step][:COUNT]):
        content = path.read_bytes()
        try:
            pixels = decode_pixels(content, name=str(path))
        except DataError:
            continue
        answer = probabilities_of(engine, pixels, preprocess)
        if not np.isfinite(answer).all():
            raise EngineError(
                f"{path}: the engine answered NaN or infinity; build in another precision"
            )
        name = f"{number:03d}{path.suffix.lower()}"
        found.append((GoldenFrame(file=name, probabilities=tuple(map(float, answer))), content))
    return tuple(found)


def pack(frames: Sequence[tuple[GoldenFrame, bytes]]) -> bytes:
    """The content of golden.zip; the same for the same frames."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        index = msgspec.json.encode([frame for frame, _ in frames])
        archive.writestr(zipfile.ZipInfo("golden.json"), index)
        for frame, content in frames:
            archive.writestr(zipfile.ZipInfo(frame.file), content)
    return buffer.getvalue()


def unpack(path: Path) -> tuple[tuple[GoldenFrame, bytes], ...]:
    """Read golden.zip. Raises FileFormatError for anything else, and for oversized images."""
    try:
        with zipfile.ZipFile(path) as archive:
            index = msgspec.json.decode(archive.read("golden.json"), type=list[GoldenFrame])
            for frame in index:
                if archive.getinfo(frame.file).file_size > _LARGEST_BYTES:
                    raise FileFormatError(f"{path}: {frame.file} is larger than any frame")
            return tuple((frame, archive.read(frame.file)) for frame in index)
    except (OSError, KeyError, zipfile.BadZipFile, msgspec.DecodeError) as error:
        raise FileFormatError(
            f"{path}: not the golden frames of a bundle ({error}); run `lpvit build` again"
        ) from error


def agreement(
    engine: "Engine", frames: Sequence[tuple[GoldenFrame, bytes]], preprocess: Preprocess
) -> Agreement:
    """Run the frames through the engine and compare with what they gave at build."""
    same, worst = 0, 0.0
    for frame, content in frames:
        pixels = decode_pixels(content, name=frame.file)
        answer = probabilities_of(engine, pixels, preprocess)
        expected = np.asarray(frame.probabilities)
        if answer.shape != expected.shape or not np.isfinite(answer).all():
            return Agreement(frames=len(frames), same_class=0, worst=1.0)
        same += int(answer.argmax() == expected.argmax())
        worst = max(worst, float(np.abs(answer - expected).max()))
    return Agreement(frames=len(frames), same_class=same, worst=worst)
