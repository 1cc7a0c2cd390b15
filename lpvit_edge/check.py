"""Prove an engine against the dense one: latency, throughput, accuracy, energy, in one run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from lpvit_edge.deps import require
from lpvit_edge.energy import energies
from lpvit_edge.errors import DataError, WrongAnswersError
from lpvit_edge.files import sha256_of
from lpvit_edge.images import Batch, ImageFolder, Preprocess, content_sha256, read_batches
from lpvit_edge.progress import track, working
from lpvit_edge.records import Check, EngineCheck, Latency

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lpvit_engines import Engine
    from lpvit_profilers.latency import LatencyMeasurement


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted classes (n,) of each engine on the images that could be read."""

    dense: "NDArray[np.int64]"
    sparse: "NDArray[np.int64]"
    targets: "NDArray[np.int64] | None"
    skipped: tuple[str, ...]


def check_engines(
    dense_onnx: Path,
    sparse_onnx: Path,
    heldout: ImageFolder,
    preprocess: Preprocess,
    *,
    engine: str,
    threads: int,
    precision: str = "default",
    predicted_latency_ms: float,
    seconds: float = 10.0,
) -> Check:
    """Run both engines alternately on this device, first for time, then over all images."""
    from lpvit_engines import load_engine, resolve_precision
    from lpvit_profilers.device import fingerprint, identify
    from lpvit_profilers.latency import measure_alternating

    with (
        load_engine(engine, dense_onnx, threads=threads, precision=precision) as dense,
        load_engine(engine, sparse_onnx, threads=threads, precision=precision) as sparse,
    ):
        image = _first_image(heldout, preprocess)
        runs: dict[str, Callable[[], object]] = {
            "dense": lambda: dense.infer(image),
            "sparse": lambda: sparse.infer(image),
        }
        with working("check: latency, energy"):
            latency = measure_alternating(runs, min_time_s=seconds)
            energy = energies(runs, engine=engine, window_s=seconds)
        answers = compare_answers(dense, sparse, heldout, preprocess)
    sides = {
        name: EngineCheck(
            latency=latency_record(latency[name]),
            throughput_per_s=1000.0 / float(np.mean(latency[name].samples_ms)),
            accuracy=_accuracy(predicted, answers.targets),
            correct=_correct(predicted, answers.targets),
            images=len(predicted),
            weight_bytes=weight_bytes(path),
            energy=energy[name],
        )
        for name, predicted, path in (
            ("dense", answers.dense, dense_onnx),
            ("sparse", answers.sparse, sparse_onnx),
        )
    }
    return Check(
        fingerprint=fingerprint(identify()),
        dense_onnx_sha256=sha256_of(dense_onnx),
        onnx_sha256=sha256_of(sparse_onnx),
        heldout_sha256=content_sha256(heldout),
        dense=sides["dense"],
        sparse=sides["sparse"],
        speedup=latency["dense"].median_ms / latency["sparse"].median_ms,
        predicted_latency_ms=predicted_latency_ms,
        accuracy_drop=_drop(sides["dense"].accuracy, sides["sparse"].accuracy),
        agreement=float((answers.dense == answers.sparse).mean()),
        skipped=answers.skipped,
        lost=_only(answers.dense, answers.sparse, answers.targets),
        won=_only(answers.sparse, answers.dense, answers.targets),
        precision=resolve_precision(engine, precision),
    )


def _first_image(images: ImageFolder, preprocess: Preprocess) -> "NDArray[np.float32]":
    for batch in read_batches(images, preprocess, size=1):
        if len(batch.images):
            return batch.images
    raise DataError(f"{images.folder}: none of {len(images.paths)} files is a readable image")


def compare_answers(
    dense: "Engine", sparse: "Engine", heldout: ImageFolder, preprocess: Preprocess
) -> Answers:
    """Classify every held-out image with both engines."""
    batches = list(_classified(dense, sparse, heldout, preprocess))
    targets = [batch.targets for _, batch in batches if batch.targets is not None]
    pairs = np.concatenate([predicted for predicted, _ in batches])
    if not len(pairs):
        raise DataError(f"{heldout.folder}: none of {len(heldout.paths)} files is readable")
    return Answers(
        dense=pairs[:, 0],
        sparse=pairs[:, 1],
        targets=np.concatenate(targets) if targets else None,
        skipped=tuple(text for _, batch in batches for text in batch.skipped),
    )


def _classified(
    dense: "Engine", sparse: "Engine", heldout: ImageFolder, preprocess: Preprocess
) -> "Iterable[tuple[NDArray[np.int64], Batch]]":
    batches = read_batches(heldout, preprocess, size=16)
    total = -(-len(heldout.paths) // 16)
    for batch in track(batches, what="check: held-out images", total=total):
        answers = [
            [int(engine.infer(image[None]).argmax()) for engine in (dense, sparse)]
            for image in batch.images
        ]
        yield np.asarray(answers, np.int64).reshape(-1, 2), batch


def _correct(predicted: "NDArray[np.int64]", targets: "NDArray[np.int64] | None") -> int | None:
    return None if targets is None else int((predicted == targets).sum())


def _only(
    a: "NDArray[np.int64]", b: "NDArray[np.int64]", targets: "NDArray[np.int64] | None"
) -> int | None:
    """Images that `a` has right and `b` has not."""
    return None if targets is None else int(((a == targets) & (b != targets)).sum())


def _accuracy(predicted: "NDArray[np.int64]", targets: "NDArray[np.int64] | None") -> float | None:
    correct = _correct(predicted, targets)
    return None if correct is None else correct / len(predicted)


def _drop(dense: float | None, sparse: float | None) -> float | None:
    return None if dense is None or sparse is None else dense - sparse


def latency_record(measured: "LatencyMeasurement") -> Latency:
    """The measurement as it is kept on disk, raw samples included."""
    return Latency(
        median_ms=measured.median_ms,
        p99_ms=measured.p99_ms,
        spread_ms=measured.mad_ms,
        samples_ms=tuple(measured.samples_ms),
        stable=measured.stable,
        reasons=tuple(measured.reasons),
    )


def weight_bytes(onnx_path: Path) -> int:
    """Bytes of all initializers of an ONNX file, indices of sparse layers included."""
    onnx, numpy_helper = require("onnx"), require("onnx.numpy_helper")
    graph = onnx.load(onnx_path).graph
    return sum(int(numpy_helper.to_array(item).nbytes) for item in graph.initializer)


def relative_error(result: "NDArray[np.float32]", reference: "NDArray[np.float32]") -> float:
    """max |result - reference| / max |reference|."""
    return float(np.abs(result - reference).max() / np.abs(reference).max())


def refuse_unequal(
    errors: dict[str, float], *, tolerance: float, reference: str = "the torch model"
) -> None:
    """Raise WrongAnswersError when a runtime does not compute what the reference does."""
    for name, error in errors.items():
        if not error <= tolerance:
            raise WrongAnswersError(
                f"{name} differs from {reference} by {error:.2e} of the largest logit "
                f"(tolerance {tolerance:.1e}), so it must not be used. Report this with the file"
            )
