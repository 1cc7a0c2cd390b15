"""Build a TensorRT engine with proof, and show what was proven."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from lpvit_edge.errors import EngineError, UnknownOptionError, WrongAnswersError
from lpvit_edge.progress import say
from lpvit_edge.tensorrt_compare import against_portable

if TYPE_CHECKING:
    from lpvit_edge.tensorrt_compare import Judge
    from lpvit_engines.tensorrt.device import OpenDevice
    from lpvit_engines.tensorrt.kept import MadePlan
    from lpvit_engines.tensorrt.plan_file import PlanManifest


def build_proven(
    onnx: Path,
    *,
    precision: str = "float16",
    python_free: bool = False,
    judge: "Judge | None" = None,
) -> "PlanManifest":
    """Build the plan beside an ONNX file, each sparse layer timed against its dense twin first.

    TensorRT's phases show as bars on stderr, and so does the table of the layers. The plan is put
    in place once the `judge` took its answers; without one they are held against the ONNX file by
    another runtime that is installed. A plan that was built and judged so from this very file on
    this device is taken as it is; a judge that raises WrongAnswersError removes it, and a plan that
    could not be asked stays. int8 needs the ranges that lpvit_edge.int8.calibrate leaves. With
    `python_free` the plan loads in trtexec and C++ too.
    """
    from lpvit_engines.tensorrt import plan_file
    from lpvit_engines.tensorrt.device import opened
    from lpvit_engines.tensorrt.kept import proven_plan

    with opened() as device, device.calls.current(device.context):
        kept = proven_plan(onnx, device, precision=precision, python_free=python_free)
        if kept is not None and judge is None and kept.manifest.compared is not None:
            return kept.manifest
        judge = judge or against_portable(onnx, precision)
        made = kept or _made(onnx, device, precision=precision, python_free=python_free)
        manifest = made.manifest
        if judge is not None:
            try:
                manifest = _judged(made, judge, device)
            except WrongAnswersError:
                if kept is not None:  # it would be taken as proven
                    plan_file.discard(onnx, precision)
                raise
            except EngineError as error:  # such as no memory beside another program
                if kept is None:
                    raise
                beside = plan_file.manifest_path(onnx, precision)
                raise EngineError(
                    f"{error}. The plan beside it stays; delete {beside} to have it built anew"
                ) from error
        plan_file.write(onnx, made.plan, manifest)
    show(manifest)
    return manifest


def _judged(made: "MadePlan", judge: "Judge", device: "OpenDevice") -> "PlanManifest":
    """The manifest with what a judge found in the plan's answers."""
    from lpvit_engines.tensorrt.answers import answering

    with answering(made.plan, device, python_free=made.manifest.python_free) as answer:
        return msgspec.structs.replace(made.manifest, compared=judge(answer))


def build_file(onnx: Path, *, engine: str, precision: str, python_free: bool) -> str:
    """Build the plan of an ONNX file alone, as on a device without torch; what to say of it.

    Raises UnknownOptionError for engines that compile when they load a file, and EngineError for
    int8 without the model.int8.json that a calibrated run left.
    """
    from lpvit_engines import resolve_precision
    from lpvit_engines.tensorrt.plan_file import plan_path

    if engine != "tensorrt":
        raise UnknownOptionError(
            f"the engine {engine} compiles {onnx.name} whenever it loads it, there is nothing to "
            "build; give the model's TOML file to make a bundle, or --engine tensorrt"
        )
    if not onnx.is_file():
        raise EngineError(f"no model file {onnx}. Give the path of an existing .onnx file")
    chosen = resolve_precision(engine, precision)
    manifest = build_proven(onnx, precision=chosen, python_free=python_free)
    kept = sum(proof.kept for proof in manifest.proofs or ())
    sparse = f"{kept} of {len(manifest.proofs or ())} sparse layers run sparse"
    path = plan_path(onnx, manifest.plan_sha256, chosen)
    return f"{path}: {chosen}, {sparse}; {_compared(manifest)}"


def _compared(manifest: "PlanManifest") -> str:
    found = manifest.compared
    if found is None:
        return "its answers were compared with nothing here"
    return (
        f"its answers differ from {found.reference}'s by {found.error:.1e} of the largest at most, "
        f"on {found.inputs} inputs (tolerance {found.tolerance:.1e})"
    )


def _made(onnx: Path, device: "OpenDevice", **given: Any) -> "MadePlan":
    from lpvit_engines.tensorrt.making import build_plan

    with _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def on_step(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase[:34], total=total)
            bars.update(tasks[phase], completed=done, total=total, visible=done < total)

        try:
            return build_plan(onnx, device, proven=True, on_step=on_step, **given)
        except KeyboardInterrupt:
            say(
                f"stopped: no plan of {onnx.name} was written, and one that was there before is as "
                "it was. What was timed for layers that were done shortens the next build"
            )
            raise


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        console=Console(stderr=True),
    )


def show(manifest: "PlanManifest", console: Console | None = None) -> None:
    """Each sparse layer: pattern, both times, kernel, kept or reverted with the reason."""
    from lpvit_engines.tensorrt.sparsity import table

    console = console or Console(stderr=True)
    proofs = manifest.proofs or ()
    if proofs:
        rows = Table(title="sparse layers against their dense twins", title_justify="left")
        for name in ("layer", "pattern", "dense ms", "sparse ms", "kernel", "verdict"):
            rows.add_column(name, overflow="fold")
        for row in table(proofs):
            rows.add_row(*row)
        console.print(rows)
    counted = manifest.sparsity
    if counted.eligible is not None:
        console.print(f"TensorRT: {counted.eligible} layers eligible, {counted.chosen} run sparse")
    if manifest.int8_layers:
        console.print(f"int8: {len(manifest.int8_layers)} linear layers")
    if manifest.half_layers:
        console.print(f"float16, as their block-sparse kernel: {', '.join(manifest.half_layers)}")
    attention = manifest.attention
    if attention is not None and attention.blocks:
        console.print(f"attention: {attention.fused} of {attention.blocks} run as one kernel")
        if attention.fused < attention.blocks:
            say(
                "TensorRT runs attention in parts, as products and softmax, which takes longer "
                "than one kernel: see docs/tensorrt.md"
            )
    in_trials = sum(proof.memory_skips for proof in proofs)
    if manifest.memory_skips or in_trials:
        say(
            f"{manifest.memory_skips} kernels were passed over for want of memory, and {in_trials} "
            "in the trials of layers: close other programs, delete the .plan.json and build again; "
            "the engine may become faster"
        )
