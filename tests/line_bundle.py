"""Bundles for a line without a real network: the fake engine answers, everything else is real."""

from pathlib import Path

import numpy as np
from PIL import Image

from lpvit_edge import files
from lpvit_edge.bundle import Bundle, open_bundle, write_bundle
from lpvit_edge.golden import golden_frames
from lpvit_edge.images import Preprocess
from lpvit_edge.records import Manifest, ModelIdentity
from lpvit_engines.fake import FakeEngine
from lpvit_profilers.device import fingerprint, identify

LABELS = ("bad", "worse", "ok")  # the fake engine always prefers the last
PREPROCESS = Preprocess(image_size=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def write_image(path: Path, level: int) -> None:
    """A grey picture, whole at once: a line may be watching the folder."""
    whole = path.parent.parent / path.name
    Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(whole)
    whole.rename(path)


def make_bundle(
    folder: Path, *, network: bytes = b"network", labels: tuple[str, ...] = LABELS, classes: int = 3
) -> Bundle:
    """A sealed bundle; with other than three classes its golden answers are not this engine's."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(network)
    image = folder.parent / "golden.png"
    write_image(image, 100)
    manifest = Manifest(
        engine="fake",
        engine_version="1",
        onnx_sha256=files.sha256_of(folder / "model.onnx"),
        fingerprint=fingerprint(identify()),
        threads=1,
        precision="float32",
        labels=labels,
        kernels={},
    )
    files.save(manifest, folder / "manifest.json")
    with FakeEngine(folder / "model.onnx", classes=classes) as engine:
        golden = golden_frames([image], engine, PREPROCESS)
    identity = ModelIdentity(name="m", weights_sha256="0", image_size=4)
    write_bundle(folder, model=identity, preprocess=PREPROCESS, golden=golden)
    return open_bundle(folder)
