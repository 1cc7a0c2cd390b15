"""Put generated frames through a bundle's engine and keep what the drift watch sees of each.

Writes one .safetensors per stream with "features" (n, width), "logits" (n, classes) and
"statistics" (n, 5): the reference's images, 100,000 frames of a healthy line (97 % good parts),
and for each fault some thousands; and beside them the drift reference that `check` left in the
bundle. The frames of a stream depend on its name alone. A run that was cut short is gone on with.

python benchmarks/drift_frames.py runs/demo --out /tmp/drift --processes 2
"""

import argparse
import multiprocessing
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from canvas import Picture, filtered_noise, rotated_grid
from generate import LABELS, draw, draw_on, label_of, photographed
from lpvit_edge.bundle import REFERENCE, open_bundle
from lpvit_edge.drift.image_statistics import image_statistics
from lpvit_edge.files import replace_atomic
from lpvit_edge.images import preprocessed
from lpvit_edge.proof import load_bundle_engine
from surfaces import SURFACES

GOOD_SHARE = 0.97
CHUNK = 500

Pixels = NDArray[np.uint8]
Draw = Callable[[np.random.Generator, int], Pixels]


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """How many frames, and the function of (generator, number) that draws one."""

    frames: int
    draw: Draw


def healthy(rng: np.random.Generator, *, lamp: float = 1.0, defocus: float = 0.0) -> Pixels:
    """A part as the line sees them: 97 of 100 are good, the others have any defect."""
    surface = list(SURFACES)[int(rng.integers(len(SURFACES)))]
    defects = [label for label in LABELS if label != "ok"]
    label = "ok" if rng.random() < GOOD_SHARE else str(rng.choice(defects))
    return draw_on(surface, label, rng=rng, lamp=lamp, defocus=defocus)


def new_material(rng: np.random.Generator) -> Pixels:
    """A part of carbon twill, which the model has never seen: diagonal bundles, nearly black."""
    u, v = rotated_grid(float(rng.uniform(0, np.pi)))
    pitch = rng.uniform(6, 9)
    over = np.floor((u + v) / pitch).astype(np.int64) % 2 == 0
    gloss = np.where(over, np.sin(2 * np.pi * u / pitch), np.sin(2 * np.pi * v / pitch))
    level = rng.uniform(0.16, 0.24) * (1 + 0.45 * gloss)
    level = level + 0.01 * filtered_noise(rng, along=2, across=0.6)
    picture = (level[..., None] * np.array([0.97, 1.0, 1.06])).astype(np.float32)
    return photographed(picture, rng, float(rng.uniform(0, 2 * np.pi)))


def new_defect(rng: np.random.Generator) -> Pixels:
    """A known material with a wrinkle: three soft ridges side by side, a class nobody trained."""
    light = float(rng.uniform(0, 2 * np.pi))
    picture = list(SURFACES.values())[int(rng.integers(len(SURFACES)))](
        rng, float(rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.12))
    )
    return photographed(_wrinkled(picture, rng), rng, light)


def _wrinkled(picture: Picture, rng: np.random.Generator) -> Picture:
    centre = (float(rng.uniform(30, 66)), float(rng.uniform(30, 66)))
    u, v = rotated_grid(float(rng.uniform(0, np.pi)), centre=centre)
    pitch, length = rng.uniform(7, 10), rng.uniform(20, 30)
    bend = v + 4 * np.sin(u / length * 2)
    window = np.exp(-0.5 * (u / length) ** 2) * (np.abs(bend) < 1.5 * pitch)
    relief = np.sin(2 * np.pi * bend / pitch) * window * rng.uniform(0.3, 0.45)
    wrinkled: Picture = (picture * (1 + relief[..., None])).astype(np.float32)
    return wrinkled


def streams(control: int, fault: int) -> dict[str, Stream]:
    found = {
        "calibration": Stream(frames=512, draw=_split("calibration")),
        "heldout": Stream(frames=2000, draw=_split("heldout")),
        "control": Stream(frames=control, draw=lambda rng, _: healthy(rng)),
        "material": Stream(frames=fault, draw=lambda rng, _: new_material(rng)),
        "defect": Stream(frames=fault, draw=lambda rng, _: new_defect(rng)),
        "lamp-slow": Stream(
            frames=2 * fault, draw=lambda rng, i: healthy(rng, lamp=1 - 0.4 * i / (2 * fault))
        ),
    }
    for lamp in (0.9, 0.8, 0.6):
        found[f"lamp-{lamp}"] = Stream(frames=fault, draw=_faulty(lamp=lamp))
    for defocus in (0.5, 0.8, 1.2):
        found[f"blur-{defocus}"] = Stream(frames=fault, draw=_faulty(defocus=defocus))
    return found


def _faulty(*, lamp: float = 1.0, defocus: float = 0.0) -> Draw:
    return lambda rng, _: healthy(rng, lamp=lamp, defocus=defocus)


def _split(name: str) -> Draw:
    return lambda _, index: draw(label_of(index), split=name, index=index)


def run_chunk(task: tuple[str, int, int, Path, Path, int, int]) -> Path:
    """Frames [start, stop) of a stream through the engine, one at a time as on the line."""
    name, start, stop, folder, chunks, control, fault = task
    path = chunks / f"{name}-{start:06d}.safetensors"
    if path.exists():
        return path
    stream = streams(control, fault)[name]
    bundle = open_bundle(folder)
    rows: dict[str, list[NDArray[np.float32]]] = {"features": [], "logits": [], "statistics": []}
    with load_bundle_engine(bundle, threads=1) as engine:
        for index in range(start, stop):
            pixels = stream.draw(np.random.default_rng([zlib.crc32(name.encode()), index]), index)
            found = engine.infer_all(preprocessed(pixels, bundle.record.preprocess)[None])
            rows["features"].append(found["features"][0])
            rows["logits"].append(found["logits"][0])
            rows["statistics"].append(image_statistics(pixels))
    arrays = {key: np.stack(value) for key, value in rows.items()}
    replace_atomic(path, lambda temporary: save_file(arrays, temporary))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, help="That `lpvit check` left a reference in.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--control", type=int, default=100_000)
    parser.add_argument("--fault", type=int, default=3_000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    out, control, fault = arguments.out, arguments.control, arguments.fault
    chunks = out / "chunks" / open_bundle(arguments.bundle).version
    chunks.mkdir(parents=True, exist_ok=True)
    for file in REFERENCE:
        shutil.copyfile(arguments.bundle / file, out / file)
    tasks = [
        (name, start, min(start + CHUNK, stream.frames), arguments.bundle, chunks, control, fault)
        for name, stream in streams(control, fault).items()
        for start in range(0, stream.frames, CHUNK)
    ]
    # The faults first: a run that is cut short has them all.
    tasks.sort(key=lambda task: task[0] == "control")
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for number, _ in enumerate(pool.imap(run_chunk, tasks), start=1):
            print(f"{number} of {len(tasks)} chunks", end="\r", flush=True)
    for name in streams(control, fault):
        found = sorted(chunks.glob(f"{name}-[0-9]*[0-9].safetensors"))
        parts = [load_file(path) for path in found]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        save_file(joined, out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
