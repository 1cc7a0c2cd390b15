"""The verb `dashboard`: this device's page, another device's, or a recording's."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from lpvit_edge.errors import UnknownOptionError

if TYPE_CHECKING:
    from lpvit_edge.dashboard.hub import Feed

_LONGEST_TOKEN = 1024


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(dashboard)


def dashboard(
    bind: Annotated[
        str,
        typer.Option(help="ADDRESS:PORT. Beyond this machine (0.0.0.0:9310) a token is asked for."),
    ] = "127.0.0.1:9310",
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the token; made up and printed when needed."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(metavar="URL", help="Show another device's page instead.")
    ] = None,
    url_token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Token of --url and of the --fleet devices.")
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="LOG", help="Play a recording of `lpvit power`, or tegrastats' log."),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds between the lines of a log without dates."),
    ] = None,
    fleet: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Another device for the strip below; may be repeated."),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Say which engine is deployed here.")
    ] = None,
) -> None:
    """Serve the page with power, temperature and, beside a line, latency, verdicts and drift.

    Alone it shows this device; `lpvit run` opens the same page for its line. Ends with Ctrl-C.

    Example: lpvit dashboard --bind 0.0.0.0:9310 --fleet http://line2:9310
    """
    from lpvit_edge.deps import require

    for library in ("starlette", "uvicorn", "prometheus_client"):
        require(library)
    from lpvit_edge.dashboard.fleet import Fleet
    from lpvit_edge.dashboard.server import serve

    if url is not None and (replay is not None or bundle is not None):
        raise UnknownOptionError("--url shows another device; leave --replay and --bundle out")
    if interval is not None and replay is None:
        raise UnknownOptionError("--interval describes a log; give one with --replay LOG")
    other_token = None if url_token_file is None else _read_token(url_token_file)
    token = page_token(bind, token_file)
    devices = Fleet(fleet, token=other_token) if fleet else None
    with ExitStack() as stack:
        feed = stack.enter_context(_feed(url, other_token, replay, interval, bundle))
        page = stack.enter_context(serve(feed, bind=bind, token=token, fleet=devices))
        announce(page.url, token if token_file is None else None)
        _wait()


def page_token(bind: str, token_file: Path | None) -> str | None:
    """The token of a page at `bind`: from the file, made up beyond loopback, otherwise none."""
    from lpvit_edge.dashboard.access import is_loopback, new_token, parse_bind

    if token_file is not None:
        return _read_token(token_file)
    host, _ = parse_bind(bind)
    return None if is_loopback(host) else new_token()


def announce(url: str, token: str | None) -> None:
    """Say on stderr where the page is, and the token that was made up for it.

    A token is not put into the system's log, which others may read: systemd sets JOURNAL_STREAM.
    """
    import os
    import sys

    said = f"dashboard: {url}"
    if token is not None and "JOURNAL_STREAM" in os.environ:
        said += "  its token was made up and stands nowhere; give one with --token-file FILE"
    elif token is not None:
        said += f"  token: {token}"
    sys.stderr.write(f"{said}\n")
    sys.stderr.flush()


@contextmanager
def _feed(
    url: str | None,
    token: str | None,
    replay: Path | None,
    interval_s: float | None,
    bundle: Path | None,
) -> "Iterator[Feed]":
    """Another device's page, or a hub without a line over this device's or a recorded sensor."""
    from lpvit_edge.dashboard.hub import Hub
    from lpvit_edge.dashboard.identity import device_identity, engine_identity
    from lpvit_edge.dashboard.power import PowerMonitor, monitor_of_this_device
    from lpvit_edge.dashboard.remote import RemoteFeed

    if url is not None:
        yield RemoteFeed(url, token=token)
        return
    device = device_identity()
    power = monitor_of_this_device() if replay is None else None
    if replay is not None:
        from lpvit_profilers.replay import ReplaySource, named_replay, read_recording

        recording = named_replay(read_recording(replay, interval_s=interval_s))
        power = PowerMonitor(ReplaySource(recording, paced=True))
        device = {"board": f"recording {replay.name}"}
    assert power is not None
    engine = None if bundle is None else engine_identity(bundle)
    with Hub(device=device, power=power, engine=engine) as hub:
        yield hub


def _read_token(path: Path) -> str:
    from lpvit_edge.dashboard.access import refuse_weak_token

    try:
        with path.open("rb") as stream:
            content = stream.read(_LONGEST_TOKEN)
        return refuse_weak_token(content.decode("ascii").strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UnknownOptionError(f"{path}: no token can be read from it ({error})") from error


def _wait() -> None:
    """Until Ctrl-C or the service manager's SIGTERM."""
    ended = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    while not ended.wait(1.0):
        pass
