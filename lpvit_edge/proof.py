"""Whether a bundle may run on this device: its engine loads and answers the golden frames."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from lpvit_edge.bundle import Bundle
from lpvit_edge.errors import MismatchError
from lpvit_edge.golden import Agreement, agreement, unpack

if TYPE_CHECKING:
    from lpvit_engines import Engine


def refuse_disagreement(found: Agreement) -> None:
    """Raise MismatchError where the golden frames got other answers than at the build."""
    if not found.holds:
        raise MismatchError(
            f"{found.same_class} of {found.frames} golden frames get the class they had when "
            f"the bundle was built (largest difference {found.worst:.3f}): this engine does "
            "not compute what was proven. Build the bundle on this device"
        )


def load_bundle_engine(
    bundle: Bundle, *, engine: str | None = None, threads: int | None = None
) -> "Engine":
    """The bundle's engine in the precision it was built in, or the one that is named in its own.

    What an engine compiles here and keeps (TensorRT) is kept only if it answers the golden frames.
    """
    from lpvit_engines import load_engine

    def answers_as_built(loaded: "Engine") -> None:
        golden = unpack(bundle.path("golden.zip"))
        refuse_disagreement(agreement(loaded, golden, bundle.record.preprocess))

    return load_engine(
        engine or bundle.manifest.engine,
        bundle.path("model.onnx"),
        threads=threads or bundle.manifest.threads,
        precision=bundle.manifest.precision if engine is None else "default",
        rebuild=bundle.rebuild,
        accept=answers_as_built,
    )


def proven_engine(
    bundle: Bundle, *, engine: str | None = None, threads: int | None = None
) -> "Engine":
    """Load the engine and warm it up on the golden frames; it is closed where they disagree.

    Raises MismatchError, EngineError and MissingDependencyError.
    """
    with ExitStack() as unproven:
        loaded = load_bundle_engine(bundle, engine=engine, threads=threads)
        unproven.callback(loaded.close)
        golden = unpack(bundle.path("golden.zip"))
        refuse_disagreement(agreement(loaded, golden, bundle.record.preprocess))
        unproven.pop_all()
    return loaded
