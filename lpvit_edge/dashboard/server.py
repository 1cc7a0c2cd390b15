"""The page's server: Starlette under uvicorn, in a thread of its own."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.responses import (
    FileResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lpvit_edge.dashboard.access import (
    COOKIE,
    Guard,
    is_loopback,
    parse_bind,
    refuse_weak_token,
    same_token,
)
from lpvit_edge.dashboard.fleet import Fleet
from lpvit_edge.dashboard.history import RESOLUTIONS, History
from lpvit_edge.dashboard.metrics import CONTENT_TYPE, exposition
from lpvit_edge.dashboard.snapshot import Snapshot, series_of
from lpvit_edge.errors import EnvironmentUnfitError, LpvitEdgeError, UnknownOptionError
from lpvit_edge.line.guarded import in_words

if TYPE_CHECKING:
    from starlette.requests import Request

    from lpvit_edge.dashboard.hub import Feed

DEFAULT_BIND = "127.0.0.1:9310"
_STATIC = Path(__file__).parent / "static"
_MOST_STREAMS = 16
_MOST_FORM_BYTES = 1024
_MOST_OPEN = 64  # connections: the line in the same process needs its files, too
_TICK_S = 1.0
_OLDEST_S = 5.0  # of what is still told as the present


class Dashboard:
    """A page that is being served; a context manager that ends it. `url` is where it is."""

    def __init__(
        self,
        feed: "Feed",
        *,
        bind: str = DEFAULT_BIND,
        token: str | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        host, port = parse_bind(bind)
        if token is None and not is_loopback(host):
            raise UnknownOptionError(
                f"{host} can be reached by other machines, so the page needs a token; give one"
            )
        self._token = None if token is None else refuse_weak_token(token)
        self._feed = feed
        self._fleet = fleet
        self._history = History()
        self._latest: tuple[int, bytes, Snapshot] | None = None
        self._taken_s = 0.0
        self._feed_error: str | None = None
        self._streams = 0
        self._stop = threading.Event()
        self._socket = _listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self.port}/"
        hosts = frozenset({"localhost", "127.0.0.1", "::1", host})
        app = Starlette(routes=self._routes())
        self._server = uvicorn.Server(
            uvicorn.Config(
                Guard(app, token=self._token, hosts=hosts),
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=2,
                limit_concurrency=_MOST_OPEN,
            )
        )
        self._ticker = threading.Thread(target=self._tick, name="dashboard ticker", daemon=True)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="dashboard", daemon=True
        )

    def __enter__(self) -> "Dashboard":
        if self._fleet is not None:
            self._fleet.__enter__()
        self._take()
        self._ticker.start()
        self._thread.start()
        deadline_s = time.monotonic() + 10.0
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline_s:
                raise EnvironmentUnfitError(f"the page's server did not start on {self.url}")
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._server.should_exit = True
        self._thread.join(10.0)
        self._ticker.join(5.0)
        self._socket.close()
        if self._fleet is not None:
            self._fleet.__exit__(kind, error, traceback)

    def _tick(self) -> None:
        next_s = time.monotonic()
        while not self._stop.wait(max(0.0, next_s - time.monotonic())):
            next_s = max(next_s + _TICK_S, time.monotonic())
            self._take()

    def _take(self) -> None:
        """The present into the history and to everybody who listens."""
        try:
            now = self._feed.now()
        except Exception as error:  # another device that does not answer, or a defect
            known = isinstance(error, LpvitEdgeError)
            self._feed_error = str(error)[:500] if known else in_words(error)
            if self._latest is not None:
                number, _, now = self._latest
                self._latest = (number + 1, self._encoded(now), now)
            return
        self._feed_error, self._taken_s = None, time.monotonic()
        self._history.add(now.at, series_of(now))
        number = 0 if self._latest is None else self._latest[0] + 1
        self._latest = (number, self._encoded(now), now)

    def _encoded(self, now: Snapshot) -> bytes:
        fleet = [] if self._fleet is None else self._fleet.devices()
        return msgspec.json.encode({"now": now, "fleet": fleet, "error": self._feed_error})

    def _routes(self) -> list[Route | Mount]:
        return [
            Route("/", self._page),
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/healthz", self._health),
            Route("/metrics", self._metrics),
            Route("/api/now", self._now),
            Route("/api/history", self._read_history),
            Route("/api/stream", self._stream),
            Mount("/static", StaticFiles(directory=_STATIC)),
        ]

    async def _page(self, request: "Request") -> Response:
        return FileResponse(_STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def _health(self, request: "Request") -> Response:
        return PlainTextResponse("ok\n")

    async def _login(self, request: "Request") -> Response:
        if request.method == "GET" or self._token is None:
            return FileResponse(_STATIC / "login.html")
        body = await _body(request)
        given = parse_qs(body.decode("ascii", "replace")).get("token", [""])[0].strip()
        if not same_token(given, self._token):
            await asyncio.sleep(0.5)
            return FileResponse(_STATIC / "login.html", status_code=403)
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", max_age=30 * 86400)
        return answer

    async def _metrics(self, request: "Request") -> Response:
        now = self._present()
        if isinstance(now, str):
            return PlainTextResponse(f"{now}\n", status_code=503)
        return Response(exposition(now), headers={"content-type": CONTENT_TYPE})

    async def _now(self, request: "Request") -> Response:
        now = self._present()
        if isinstance(now, str):
            return PlainTextResponse(f"{now}\n", status_code=503)
        return _json(msgspec.json.encode(now))

    def _present(self) -> Snapshot | str:
        """What is known now, or why there is nothing: an old snapshot is not the present."""
        if self._latest is None:
            return "the first reading is not there yet"
        if self._feed_error is not None:
            return f"the present is not known: {self._feed_error}"
        age_s = time.monotonic() - self._taken_s
        if age_s > _OLDEST_S:
            return f"the last reading is {age_s:.0f} s old"
        return self._latest[2]

    async def _read_history(self, request: "Request") -> Response:
        resolution = request.query_params.get("span", "10m")
        if resolution not in RESOLUTIONS:
            return PlainTextResponse(f"span is one of {', '.join(RESOLUTIONS)}\n", status_code=400)
        times, series = self._history.read(resolution)
        content = {"step_s": RESOLUTIONS[resolution][0], "t": times, "series": series}
        return _json(msgspec.json.encode(content))

    async def _stream(self, request: "Request") -> Response:
        if self._streams >= _MOST_STREAMS:
            return PlainTextResponse("too many pages are open on this device\n", status_code=503)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)

    async def _events(self) -> AsyncIterator[bytes]:
        """One message a second, and a comment when there is nothing new, so that a lost
        connection is noticed."""
        self._streams += 1
        sent = -1
        try:
            while not self._stop.is_set():
                latest = self._latest
                if latest is not None and latest[0] != sent:
                    sent = latest[0]
                    yield b"data: " + latest[1] + b"\n\n"
                await asyncio.sleep(0.25)
        finally:
            self._streams -= 1


def serve(
    feed: "Feed",
    *,
    bind: str = DEFAULT_BIND,
    token: str | None = None,
    fleet: Fleet | None = None,
) -> Dashboard:
    """The page of a hub, to be used in a with block; it listens from then on.

    `bind` is ADDRESS:PORT; beyond loopback a token is needed. Raises UnknownOptionError for an
    address or a token that will not do and EnvironmentUnfitError where the port is taken.
    """
    return Dashboard(feed, bind=bind, token=token, fleet=fleet)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise EnvironmentUnfitError(
            f"cannot listen on {host} port {port}: {error.strerror}. Another page may be open; "
            "stop it or give another --bind"
        ) from error


async def _body(request: "Request") -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_FORM_BYTES:
            return b""
    return body


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json", headers={"cache-control": "no-store"})
