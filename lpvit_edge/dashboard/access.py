"""Who may look: this machine alone, or whoever knows the token.

Without a token the server listens on a loopback address only, and refuses requests for other host
names, so that a page from elsewhere cannot read it through a name that it points here.
"""

import asyncio
import hmac
import ipaddress
import re
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse

from lpvit_edge.errors import UnknownOptionError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "lpvit_token"
LEAST_TOKEN = 16
_OPEN = ("/login", "/static/", "/healthz")
_WRONG_TOKEN_S = 0.5
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        b"connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


def parse_bind(bind: str) -> tuple[str, int]:
    """Address and port of "127.0.0.1:9310", "[::1]:9310" or "localhost:0" (any free port)."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):(\d{1,5})", bind)
    if not found or int(found[3]) > 65535:
        raise UnknownOptionError(
            f"{bind!r} is no address to listen on; give ADDRESS:PORT, such as 127.0.0.1:9310"
        )
    host = found[1] or found[2]
    if host == "localhost":
        return "127.0.0.1", int(found[3])
    try:
        return str(ipaddress.ip_address(host)), int(found[3])
    except ValueError as error:
        raise UnknownOptionError(
            f"{host!r} is not an IP address; give one, or localhost"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(host).is_loopback


def new_token() -> str:
    """A token that cannot be guessed."""
    return secrets.token_urlsafe(24)


def refuse_weak_token(token: str) -> str:
    """The token, or UnknownOptionError where it could be guessed or cannot stand in a header."""
    if len(token) < LEAST_TOKEN or not re.fullmatch(r"[A-Za-z0-9._~+/=-]+", token):
        raise UnknownOptionError(
            f"the token must have at least {LEAST_TOKEN} letters, digits or ._~+/=-; make one "
            'with: python -c "import secrets; print(secrets.token_urlsafe(24))"'
        )
    return token


def same_token(given: str | None, token: str) -> bool:
    """Compared in constant time."""
    return given is not None and hmac.compare_digest(given.encode(), token.encode())


class Guard:
    """Middleware: lets a request pass or answers it, and sets the security headers of all."""

    def __init__(self, app: "ASGIApp", *, token: str | None, hosts: frozenset[str]) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] != "http":
            return

        async def send_safely(message: "dict[str, object]") -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers")
                message["headers"] = [*(headers if isinstance(headers, list) else []), *_HEADERS]
            await send(message)

        refusal = await self._refusal(scope)
        app = self._app if refusal is None else refusal
        await app(scope, receive, send_safely)  # type: ignore[arg-type]

    async def _refusal(self, scope: "Scope") -> "ASGIApp | None":
        headers = Headers(scope=scope)
        if self._token is None:
            if _host_name(headers.get("host", "")) in self._hosts:
                return None
            return PlainTextResponse(
                "This page answers to localhost only. To open it to other machines, start it with "
                "--bind ADDRESS:PORT, which asks for a token.\n",
                status_code=421,
            )
        path = str(scope["path"])
        if path.startswith(_OPEN) or same_token(given_token(headers), self._token):
            return None
        if given_token(headers) is not None:
            await asyncio.sleep(_WRONG_TOKEN_S)
        if path == "/":
            return RedirectResponse("/login", status_code=303)
        return PlainTextResponse(
            "Give the token: Authorization: Bearer TOKEN\n",
            status_code=401,
            headers={"www-authenticate": "Bearer"},
        )


def given_token(headers: Headers) -> str | None:
    """The token that a request carries in a header or in a cookie."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


def _host_name(host: str) -> str:
    """The name in a Host header without its port."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower()
