"""Addresses of brokers and controllers: scheme://user:password@host:port/path."""

from urllib.parse import unquote

import msgspec

from lpvit_edge.errors import UnknownOptionError
from lpvit_edge.line.redact import from_environment, redacted


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """An address taken apart; each part may have come from the environment."""

    scheme: str
    host: str
    port: int
    user: str | None
    password: str | None
    path: str  # without slashes at its ends


def parse_address(target: str, ports: dict[str, int], *, option: str) -> Address:
    """Take an address apart; `ports` names the schemes known, each with its usual port.

    ${NAME} is replaced in each part by itself, so that a password may hold any character.
    Raises UnknownOptionError for anything else, EnvironmentUnfitError for a variable not set.
    """
    scheme, _, rest = target.partition("://")
    place, _, path = rest.partition("/")
    account, _, where = place.rpartition("@")
    host, port = _host_and_port(from_environment(where))
    if scheme not in ports or not host or port is None:
        example = f"{next(iter(ports))}://host:{next(iter(ports.values()))}"
        raise UnknownOptionError(f"{option} {redacted(target)!r}: write it like {example}")
    user, _, password = account.partition(":")
    return Address(
        scheme=scheme,
        host=host,
        port=port or ports[scheme],
        user=from_environment(unquote(user)) or None,
        password=from_environment(unquote(password)) or None,
        path=from_environment(path).strip("/"),
    )


def _host_and_port(where: str) -> tuple[str, int | None]:
    """Host and port, 0 where none is named, None where it is none; IPv6 stands in brackets."""
    if where.startswith("["):
        host, _, rest = where[1:].partition("]")
        port = rest.removeprefix(":")
    else:
        host, _, port = where.partition(":")
    if not port:
        return host, 0
    return host, int(port) if port.isdecimal() and 0 < int(port) < 65536 else None
