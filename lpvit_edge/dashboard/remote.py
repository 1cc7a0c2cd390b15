"""Reading other devices over HTTP: bounded in time and size, and believed only when it fits."""

import re
import urllib.error
import urllib.request
from typing import IO, Any
from urllib.parse import urlsplit

import msgspec

from lpvit_edge.dashboard.snapshot import Snapshot
from lpvit_edge.errors import DataError, UnknownOptionError

MOST_BYTES = 1 << 20


def checked_url(url: str) -> str:
    """The address of another device's page, without its path. Raises UnknownOptionError."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise UnknownOptionError(f"{url!r} is no address of a page; give http://DEVICE:9310")
    if parts.username or parts.password:
        raise UnknownOptionError(
            "an address must not hold a password, which would show in lists of processes; put the "
            "token into a file"
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A device answers itself or not at all: a token must not travel elsewhere."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> None:
        return None


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


def fetch(url: str, *, token: str | None, timeout_s: float) -> bytes:
    """The content of an http address, at most 1 MiB. Raises DataError saying what went wrong."""
    request = urllib.request.Request(url, headers={"User-Agent": "lpvit-edge"})
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with _OPENER.open(request, timeout=timeout_s) as answer:
            content = answer.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        hint = "; it asks for a token" if error.code in (303, 401) else ""
        raise DataError(f"{url} answers {error.code}{hint}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url} does not answer ({_reason(error)})") from error
    if len(content) > MOST_BYTES:
        raise DataError(f"{url} sends more than {MOST_BYTES} bytes; it is no page of lpvit")
    return bytes(content)


def _reason(error: Exception) -> str:
    return re.sub(r"^<urlopen error (.*)>$", r"\1", str(error))


class RemoteFeed:
    """Another device's present, asked for each time."""

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 3.0) -> None:
        self.url = checked_url(url)
        self._token = token
        self._timeout_s = timeout_s

    def now(self) -> Snapshot:
        content = fetch(f"{self.url}/api/now", token=self._token, timeout_s=self._timeout_s)
        try:
            return msgspec.json.decode(content, type=Snapshot)
        except msgspec.MsgspecError as error:
            raise DataError(
                f"{self.url} sends something else than this version's page: {error}"
            ) from error
