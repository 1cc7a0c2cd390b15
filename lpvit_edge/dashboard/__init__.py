"""The page that shows a device and its line: power, latency, verdicts, drift.

hub = Hub(identity=identity_of_this_device(), power=PowerMonitor(source))
with hub, serve(hub, bind="127.0.0.1:9310") as dashboard:
    line.run(hub)               # publishes frames and events to the hub
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpvit_edge.dashboard.hub import Hub as Hub
    from lpvit_edge.dashboard.server import serve as serve

_PUBLIC = {"Hub": "lpvit_edge.dashboard.hub", "serve": "lpvit_edge.dashboard.server"}


def __getattr__(name: str) -> Any:
    """Both are imported when they are asked for: the server needs the extra `serve`."""
    from importlib import import_module

    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
