"""A line with its page: power, latency and verdicts, and the drift of what the camera sees."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lpvit_edge.bundle import REFERENCE, Bundle
from lpvit_edge.deps import require
from lpvit_edge.line.config import LineConfig

if TYPE_CHECKING:
    from lpvit_edge.dashboard.hub import Hub
    from lpvit_edge.drift.monitor import DriftMonitor


@contextmanager
def watched(
    bundle: Bundle, config: LineConfig, *, bind: str | None, token: str | None
) -> "Iterator[Hub | None]":
    """A hub for the line, its page at `bind`; None without one (nobody watches then).

    Raises MissingDependencyError without the server's libraries, and what dashboard.serve raises.
    """
    if bind is None:
        yield None
        return
    for library in ("starlette", "uvicorn", "prometheus_client"):
        require(library)
    from lpvit_edge.dashboard.hub import Hub
    from lpvit_edge.dashboard.identity import (
        checked_energy_j,
        device_identity,
        engine_identity,
    )
    from lpvit_edge.dashboard.power import monitor_of_this_device
    from lpvit_edge.dashboard.server import serve

    hub = Hub(
        device=device_identity(),
        power=monitor_of_this_device(),
        engine=engine_identity(bundle.folder),
        model_energy=checked_energy_j(bundle.folder),
    )
    hub.watcher = drift_monitor(bundle, config, hub)
    with ExitStack() as stack:
        stack.enter_context(hub)
        stack.enter_context(serve(hub, bind=bind, token=token))
        yield hub


def drift_monitor(bundle: Bundle, config: LineConfig, hub: "Hub") -> "DriftMonitor | None":
    """The watch over the bundle's reference; None where `check` left none (too few images, say).

    Its samples and requests go into `drift` in the line's state folder.
    """
    from lpvit_edge.drift.monitor import DriftMonitor
    from lpvit_edge.drift.reference import load_reference

    if not all(bundle.path(name).is_file() for name in REFERENCE):
        return None
    reference, _ = load_reference(bundle.folder)
    return DriftMonitor(
        reference, config.drift, folder=Path(config.state) / "drift", tell=hub.publish_event
    )
