"""A line as a service: it starts, tells the service manager, serves /healthz, drains and ends."""

import signal
import time
from collections.abc import Callable

import msgspec

from lpvit_edge.dashboard.snapshot import ShadowNow
from lpvit_edge.dashboard_cli import announce
from lpvit_edge.errors import EngineError, MismatchError
from lpvit_edge.line.bundles import Bundles
from lpvit_edge.line.config import LineConfig
from lpvit_edge.line.health import HealthServer
from lpvit_edge.line.judge import Summary
from lpvit_edge.line.line import Line
from lpvit_edge.line.notify import Notifier
from lpvit_edge.line.watched import shadowed, watch_drift, watched


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What a line did until it ended. `undelivered` is by sink, and stays in the journal."""

    summary: Summary
    undelivered: dict[str, int]
    shadow: ShadowNow | None


def serve_line(
    bundles: Bundles,
    settings: LineConfig,
    *,
    page: str | None,
    token: str | None,
    said: bool,
    seconds: float | None,
) -> Served:
    """Run until the source ends, SIGTERM or SIGINT, or so many seconds.

    The page's token is printed once where `said`. Where a stored bundle fails its warm-up, once
    more with the one before.
    """
    announced = False
    while True:
        opened = bundles.begin()
        with watched(opened, settings, bind=page, token=token) as hub:
            if page is not None and not announced:
                announce(f"http://{page}", token if said else None)
                announced = True
            line = Line(opened, settings, hub=hub)
            _stop_on_signals(line)
            if hub is not None:
                watch_drift(hub, line, bundles)
            bundles.tell(line)
            started = False
            try:
                with shadowed(line, hub, bundles) as shadow:
                    bundles.starting()
                    line.start()
                    started = True
                    if hub is not None:
                        hub.waits()
                    _serve(line, bundles, seconds)
            except (MismatchError, EngineError) as error:
                if started or not bundles.go_back(str(error)):
                    raise
                continue
            finally:
                left = line.close()
            bundles.end()
            return Served(
                summary=line.summary(),
                undelivered=left,
                shadow=None if shadow is None else shadow.now(),
            )


def _stop_on_signals(line: Line) -> None:
    notifier = Notifier()

    def stop(*_: object) -> None:
        notifier.send(stopping="1", status="judging what was taken")
        line.request_stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _serve(line: Line, bundles: Bundles, seconds: float | None) -> None:
    """Judge until the end or request_stop(); what waits then is still judged."""
    notify = _watchdog(line, seconds)

    def each() -> None:
        notify()
        bundles.look(line)

    server = None
    try:
        if line.config.health is not None:
            server = HealthServer(line.config.health, line.status)
        line.run(each=each)
    finally:
        if server is not None:
            server.close()


def _watchdog(line: Line, seconds: float | None) -> Callable[[], None]:
    """Called between frames: says READY after the first verdict of the engine, then WATCHDOG.

    WATCHDOG is only sent while the engine answers and every thread lives: what a restart of the
    service mends. A source that is away is not: the capture process is started again instead.
    """
    notifier = Notifier()
    end_s = None if seconds is None else time.monotonic() + seconds
    period_s = min(1.0, (notifier.watchdog_s or 4.0) / 4)
    ready, sent_s = False, 0.0

    def each() -> None:
        nonlocal ready, sent_s
        now_s = time.monotonic()
        if end_s is not None and now_s >= end_s:
            line.request_stop()
        if now_s - sent_s < period_s:
            return
        counts = line.settlement.counts
        if not ready and counts.ok + counts.reject > 0:
            ready = True
            notifier.send(ready="1")
        status = line.status()
        if ready and status.engine and status.alive:
            sent_s = now_s
            notifier.send(watchdog="1", status=f"{status.frames} frames, {status.text}")

    return each
