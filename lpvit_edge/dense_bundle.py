"""A bundle of the network as it was before pruning, from the dense.onnx that a run left."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from lpvit_edge import files
from lpvit_edge.bundle import REFERENCE, open_bundle, write_bundle
from lpvit_edge.errors import FileFormatError, MismatchError
from lpvit_edge.golden import GoldenFrame, probabilities_of, unpack
from lpvit_edge.images import decode_pixels
from lpvit_edge.progress import say
from lpvit_edge.records import Check

DENSE_REFERENCE = "dense_reference"  # .json and .safetensors, written by `check`


@contextmanager
def dense_bundle(run: Path, *, rebuild: bool = False) -> Iterator[Path]:
    """A folder, removed afterwards, with the run's dense.onnx sealed as a bundle of its own.

    Its golden answers are those of the dense engine on this device now, over the images of the
    run's golden frames; dense.onnx must be the file whose accuracy `lpvit check` measured. What
    that engine compiled and keeps (TensorRT) goes along; with `rebuild` it is compiled again where
    it is of another device, which is DeviceMismatchError otherwise. Raises FileFormatError where
    the run left no dense.onnx or no check, MismatchError for another file.
    """
    from lpvit_engines import load_engine

    sparse = open_bundle(run)
    onnx = run / "dense.onnx"
    if not onnx.is_file():
        raise FileFormatError(f"{onnx}: no such file; give the whole folder that `optimize` left")
    proven = files.load(Check, run / "check.json").dense_onnx_sha256
    if proven != files.sha256_of(onnx):
        raise MismatchError(f"{onnx}: not the file that check.json is about; run `lpvit check`")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preprocess = sparse.record.preprocess
        manifest = sparse.manifest
        with load_engine(
            manifest.engine,
            onnx,
            threads=manifest.threads,
            precision=manifest.precision,
            rebuild=rebuild,
        ) as engine:
            golden = tuple(
                (_answered(frame, probabilities_of(engine, pixels, preprocess).tolist()), content)
                for frame, content in unpack(sparse.path("golden.zip"))
                for pixels in (decode_pixels(content, name=frame.file),)
            )
            dense = msgspec.structs.replace(manifest, onnx_sha256=proven, kernels=engine.kernels())
        _copy_as_model(run, folder)
        files.save(dense, folder / "manifest.json")
        write_bundle(folder, model=sparse.record.model, preprocess=preprocess, golden=golden)
        _add_reference(run, folder, proven)
        yield folder


def _copy_as_model(run: Path, folder: Path) -> None:
    """The dense network, its calibration and its plans, under the names that they have in a
    bundle."""
    for pattern in ("dense.onnx", "dense.int8.json", "dense*.plan.json", "dense*.plan"):
        for path in run.glob(pattern):
            shutil.copyfile(path, folder / f"model{path.name.removeprefix('dense')}")


def _add_reference(run: Path, folder: Path, onnx_sha256: str) -> None:
    """What the dense engine makes of the checked images, where `check` left it."""
    from lpvit_edge.drift.reference import ReferenceNote

    note = run / f"{DENSE_REFERENCE}.json"
    if not note.is_file():
        say(f"{run}: no {note.name}, so drift is not watched while the dense engine runs")
        return
    if files.load(ReferenceNote, note).onnx_sha256 != onnx_sha256:
        raise MismatchError(f"{note}: not about {run / 'dense.onnx'}; run `lpvit check` again")
    for name in REFERENCE:
        content = (run / f"{DENSE_REFERENCE}{Path(name).suffix}").read_bytes()
        files.write_atomic(folder / name, content)


def _answered(frame: GoldenFrame, probabilities: list[float]) -> GoldenFrame:
    return GoldenFrame(file=frame.file, probabilities=tuple(probabilities))
