"""A line with its page: power, latency and verdicts, and the drift of what the camera sees."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge.bundle import REFERENCE, Bundle
from lpvit_edge.deps import require
from lpvit_edge.energy import working_part
from lpvit_edge.errors import LpvitEdgeError, MismatchError
from lpvit_edge.line.config import LineConfig

if TYPE_CHECKING:
    from lpvit_edge.dashboard.hub import Hub
    from lpvit_edge.drift.monitor import DriftMonitor, Tell
    from lpvit_edge.line.bundles import Bundles
    from lpvit_edge.line.line import Line
    from lpvit_edge.line.shadow import Shadow


@contextmanager
def watched(
    bundle: Bundle, config: LineConfig, *, bind: str | None, token: str | None
) -> "Iterator[Hub | None]":
    """A hub for the line and its page at `bind`; without a page only where drift is watched.

    Raises MissingDependencyError without the server's libraries, and what dashboard.serve raises.
    """
    if bind is None and not _has_reference(bundle):
        yield None
        return
    from lpvit_edge.dashboard.hub import Hub
    from lpvit_edge.dashboard.identity import device_identity
    from lpvit_edge.dashboard.power import PowerMonitor, monitor_of_this_device

    if bind is None:
        with Hub(device={}, power=PowerMonitor(None, reason="nobody watches the power")) as hub:
            yield hub
        return
    for library in ("starlette", "uvicorn", "prometheus_client"):
        require(library)
    from lpvit_edge.dashboard.server import serve

    with ExitStack() as stack:
        power = monitor_of_this_device(working=working_part(bundle.manifest.engine))
        hub = stack.enter_context(Hub(device=device_identity(), power=power))
        show_bundle(hub, bundle)()
        stack.enter_context(serve(hub, bind=bind, token=token))
        yield hub


@contextmanager
def shadowed(line: "Line", hub: "Hub | None", bundles: "Bundles") -> "Iterator[Shadow | None]":
    """The dense engine beside the line, as its [shadow] table says; None without one."""
    rule = line.config.shadow
    if rule is None:
        yield None
        return
    from lpvit_edge.line.shadow import Shadow

    bundle = bundles.beside(rule.bundle)
    with Shadow(bundle, rule, line.config.verdict, event=line.settlement.event) as shadow:
        line.outputs.shadow = shadow
        if hub is not None:
            hub.shadow = shadow.now
        yield shadow
        line.outputs.shadow = None


def show_bundle(hub: "Hub", bundle: Bundle) -> Callable[[], None]:
    """Read what the page says of an engine; what is returned says it."""
    from lpvit_edge.dashboard.identity import checked_energy, engine_identity

    return partial(hub.show_engine, engine_identity(bundle.folder), checked_energy(bundle))


def watch_drift(hub: "Hub", line: "Line", bundles: "Bundles") -> None:
    """Watch what the line sees, with the reference of the bundle that runs, whichever it is.

    Alarms are events of the line: in its journal, on the page and in the metrics.
    """

    def prepare(bundle: Bundle) -> Callable[[], None]:
        show = show_bundle(hub, bundle)
        monitor, problem = None, None
        try:
            monitor = drift_monitor(
                bundle,
                line.config,
                tell=lambda kind, text, severity, at: line.settlement.event(kind, text, severity),
                fall_back=lambda reason: bundles.fall_back(line, reason, of=bundle),
            )
        except (LpvitEdgeError, OSError) as error:  # a line without its watch is better than none
            problem = f"nobody watches for drift: {error}"

        def go_over() -> None:
            show()
            line.threads.aside.pop("drift watch", None)
            hub.watch(monitor)
            if problem is not None:
                line.settlement.event("drift", problem, "alarm")

        return go_over

    def failed(text: str) -> None:
        line.threads.aside["drift watch"] = text
        line.settlement.event("drift", text, "alarm")

    hub.failed = failed
    hub.dropped = lambda: line.dropped
    line.swap.prepare = prepare
    prepare(line.bundle)()


def drift_monitor(
    bundle: Bundle, config: LineConfig, *, tell: "Tell", fall_back: Callable[[str], None]
) -> "DriftMonitor | None":
    """The watch over the bundle's reference; None where `check` left none (too few images, say).

    Its samples, requests and past go into `drift` in the line's state folder. Raises
    FileFormatError for a damaged reference, MismatchError for one of another model.
    """
    from lpvit_edge.drift.monitor import DriftMonitor
    from lpvit_edge.drift.reference import load_reference

    if not _has_reference(bundle):
        return None
    reference, note = load_reference(bundle.folder)
    if note.onnx_sha256 != bundle.manifest.onnx_sha256:
        raise MismatchError(
            f"{bundle.path('reference.json')} is about the model {note.onnx_sha256[:12]}, the "
            f"bundle's is {bundle.version}; run `lpvit check` after `lpvit build`"
        )
    folder = Path(config.state) / "drift"
    return DriftMonitor(
        reference,
        config.drift,
        folder=folder,
        past=folder / f"past-{note.arrays_sha256[:12]}.safetensors",
        tell=tell,
        fall_back=fall_back,
        bundle=bundle.version,
    )


def _has_reference(bundle: Bundle) -> bool:
    return all(bundle.path(name).is_file() for name in REFERENCE)
