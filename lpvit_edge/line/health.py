"""/healthz and /readyz, for a service manager or a load balancer.

/healthz   200 while the engine answers (it passed a frame, or a golden frame, not long ago) and
           every thread that verdicts need is alive
/readyz    200 while parts can be judged: the source is live, too
"""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from lpvit_edge.errors import EnvironmentUnfitError, UnknownOptionError


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What both pages are made from."""

    engine: bool
    source: bool
    alive: bool  # no thread that verdicts need has ended
    text: str
    frames: int
    safe: int
    dropped: int
    waiting_on_disk: int
    sinks: dict[str, str]  # by sink, what is wrong with it
    missed: dict[str, int]  # by sink, verdicts that it missed; `journal`: entries lost
    died: dict[str, str]  # by thread, which error nobody expected ended it


class HealthServer:
    """Serves the status in a thread; a context manager is not needed: close() ends it."""

    def __init__(self, bind: str, status: Callable[[], Status]) -> None:
        """Listen on host:port. Raises EnvironmentUnfitError where the port is taken."""
        host, port = split_address(bind, "health")

        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0

            def do_GET(self) -> None:
                now = status()
                sound = now.engine and now.alive
                known = {"/healthz": sound, "/readyz": sound and now.source}
                if self.path not in known:
                    self.send_error(404)
                    return
                content = msgspec.json.encode(now)
                self.send_response(200 if known[self.path] else 503)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                """A probe every second is no news."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise EnvironmentUnfitError(
                f"cannot listen on {bind}: {error.strerror}; choose another port"
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="health", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def split_address(text: str, option: str) -> tuple[str, int]:
    """host:port. Raises UnknownOptionError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UnknownOptionError(f"{option} {text!r}: write host:port, such as 127.0.0.1:8081")
    return host.strip("[]"), int(port)
