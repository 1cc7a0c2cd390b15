"""Verdicts to an OPC UA server, into nodes that are there already.

The nodes' types are read at each connection. A verdict is written in two requests: all that it
says, then `number`, so that whoever sees a new number finds the rest in place. A few times a second
`heartbeat`, `state`, `judging` and the counters follow.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import os
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from lpvit_edge.deps import require
from lpvit_edge.errors import SinkError, UnknownOptionError
from lpvit_edge.line.address import parse_address
from lpvit_edge.line.journal import Entry
from lpvit_edge.line.redact import redacted
from lpvit_edge.line.sink_config import OpcUaSink
from lpvit_edge.line.sinks.opcua_values import (
    HELD,
    NO_REJECT,
    OFFLINE,
    ONLINE,
    Content,
    count_values,
    state_values,
    typed,
    verdict_values,
)
from lpvit_edge.line.sinks.tally import Tally, Timely

# A client that dies without a farewell occupies one of the server's sessions for so long.
_SESSION_MS = 30_000
_IMPOSTOR = "; is server_certificate that of this server? It answers nothing that it cannot read"
Result = TypeVar("Result")


class OpcUa:
    """A client with one session, opened anew after each failure."""

    batch = 16
    longest_wait_s = 2.0

    def __init__(self, config: OpcUaSink) -> None:
        """Check what can be checked at once. Raises UnknownOptionError, MissingDependencyError."""
        self.name = f"opcua {redacted(config.target)}"
        self._config = config
        self._address = parse_address(config.target, {"opc.tcp": 4840}, option="opcua")
        self._nodes: dict[str, str] = {
            field: node
            for field, node in msgspec.structs.asdict(config.nodes).items()
            if node is not None
        }
        self._refuse_unfit()
        self._ua = require("asyncua.ua")
        self._asyncua = require("asyncua")
        self._sync = require("asyncua.sync")
        self._failures = (
            OSError,
            asyncio.TimeoutError,
            concurrent.futures.TimeoutError,
            self._ua.UaError,
        )
        # It tells each failed attempt to stderr otherwise, and at DEBUG passwords too.
        logging.getLogger("asyncua").addHandler(logging.NullHandler())
        logging.getLogger("asyncua").setLevel(logging.WARNING)
        self._ids = {field: self._node_id(field, node) for field, node in self._nodes.items()}
        self._types: dict[str, Any] = {}
        self._tally = Tally(config.max_age_ms)
        self._loop: Any = None  # asyncua's thread, in which all of it runs
        self._client: Any = None
        self._is_sound = False  # the last request was answered
        self._heart = 0
        self._told = 0  # newest entry written
        self._shown = 0  # newest entry that `reject` was to show, answered or not
        self._rejects = False  # the newest part

    def _refuse_unfit(self) -> None:
        config = self._config
        if not self._nodes:
            raise UnknownOptionError(
                f'{self.name}: name the nodes to write to, such as nodes.verdict = "ns=2;s=Verdict"'
            )
        files = (config.certificate, config.key, config.server_certificate)
        if config.security != "none" and None in files:
            raise UnknownOptionError(
                f"{self.name}: security = {config.security} needs certificate and key (of this "
                "client) and server_certificate (which one to trust)"
            )
        if config.security == "none" and self._address.password is not None:
            raise UnknownOptionError(
                f"{self.name}: a password would travel readable; set security and its certificates"
            )

    def _node_id(self, field: str, node: str) -> Any:
        try:
            return self._ua.NodeId.from_string(node)
        except (self._ua.UaError, ValueError) as error:
            raise UnknownOptionError(
                f"{self.name}: nodes.{field} = {node!r}: write a node id like ns=2;s=Line3.Verdict"
            ) from error

    @property
    def missed(self) -> int:
        """Verdicts that were too old to be told."""
        return self._tally.missed

    def resume(self, delivered: int, newest: int) -> int:
        """What an earlier run decided happened to parts that are gone."""
        return newest

    def too_old(self, entries: Sequence[Entry]) -> int:
        """How many of the first entries need not be sent."""
        return self._tally.too_old(entries)

    def send(self, entries: Sequence[Entry]) -> None:
        """Write each verdict that is young enough."""
        for entry in entries:
            timely = self._tally.take(entry)
            if timely is not None and (entry.id <= self._told or self._has_told(timely)):
                continue
            if entry.kind == "frame" and self._rejects:
                self._rejects = False  # the newest part is another, and was too late to be told
                self._connect()
                self._write(NO_REJECT)
        self._tally.forget(entries[-1].id)

    def _has_told(self, timely: Timely) -> bool:
        """In two requests, of which none makes known what turned too old; False without any."""
        self._connect()
        young = self._tally.still([timely])
        if not young:
            return False
        self._write(self._once(young[0]))
        if self._tally.still(young):
            number = timely.record.number
            self._write({"number": (str(number), number)} | count_values(self._tally))
            self._told = timely.entry
        return True

    def _once(self, timely: Timely) -> dict[str, Content]:
        """The verdict; `reject` is set once, since where an answer was lost it may have been."""
        rejects, is_again = timely.record.action == "reject", timely.entry <= self._shown
        if rejects and is_again:
            self._tally.miss(timely.entry)
        self._rejects, self._shown = rejects and not is_again, timely.entry
        return verdict_values(timely) | (NO_REJECT if is_again else {})

    def beat(self, *, is_held: bool) -> None:
        """Write the state with another heartbeat."""
        self._connect()
        self._heart += 1
        state = HELD if is_held else ONLINE
        values = state_values(state, self._heart) | count_values(self._tally)
        self._rejects = self._rejects and not is_held
        self._write(values if self._rejects else values | NO_REJECT)

    def disconnect(self) -> None:
        """Say that the line was stopped, where the server still answers, and let go."""
        self._rejects = False
        client, loop, is_sound = self._client, self._loop, self._is_sound
        if loop is None:
            return
        with contextlib.suppress(SinkError):
            if is_sound:
                self._write(state_values(OFFLINE, self._heart) | count_values(self._tally))
        with contextlib.suppress(SinkError):
            if client is not None:
                self._await(client.disconnect() if is_sound else _drop(client))
        self._client = self._loop = None
        loop.post(_end_all())
        loop.stop()

    def _connect(self) -> None:
        if self._client is not None:
            return
        if self._loop is None:
            self._loop = self._sync.ThreadLoop(None)
            self._loop.daemon = True
            self._loop.start()
        self._client = self._await(self._open())
        self._types = self._await(self._read_types())

    async def _open(self) -> Any:
        config, address = self._config, self._address
        host = f"[{address.host}]" if ":" in address.host else address.host
        client = self._asyncua.Client(
            f"opc.tcp://{host}:{address.port}/{address.path}", timeout=config.timeout_s
        )
        client.name = client.description = "lpvit-edge"
        client.application_uri = config.application_uri
        client.session_timeout = _SESSION_MS
        if address.user is not None:
            client.set_user(address.user)
            client.set_password(address.password or "")
        if config.security != "none":
            await self._secure(client)
        async with contextlib.AsyncExitStack() as unfinished:
            unfinished.push_async_callback(_drop, client)  # an attempt that is given up, too
            await client.connect()
            unfinished.pop_all()
        return client

    async def _secure(self, client: Any) -> None:
        config = self._config
        policies = require("asyncua.crypto.security_policies")
        try:
            await client.set_security(
                getattr(policies, f"SecurityPolicy{config.security}"),
                certificate=Path(config.certificate or ""),
                private_key=Path(config.key or ""),
                server_certificate=config.server_certificate,
                mode=getattr(self._ua.MessageSecurityMode, config.mode),
            )
        except (OSError, ValueError, TypeError) as error:
            raise SinkError(f"the certificates cannot be used ({error})") from error

    async def _read_types(self) -> dict[str, Any]:
        found = {}
        for field, node_id in self._ids.items():
            try:
                node = self._client.get_node(node_id)
                found[field] = await node.read_data_type_as_variant_type()
            except self._ua.UaStatusCodeError as error:
                raise SinkError(f"nodes.{field} = {self._nodes[field]}: {error}") from error
        return found

    def _write(self, values: dict[str, Content]) -> None:
        """Write those that have a node, in one request."""
        fields = [field for field in values if field in self._ids]
        if not fields:
            return
        try:
            contents = [self._data_value(field, values[field]) for field in fields]
        except SinkError as error:
            raise SinkError(f"{self.name}: {error}") from error
        nodes = [self._client.get_node(self._ids[field]) for field in fields]
        results = self._await(
            self._client.write_values(nodes, contents, raise_on_partial_error=False)
        )
        for field, result in zip(fields, results, strict=True):
            if not result.is_good():
                raise SinkError(
                    f"{self.name}: nodes.{field} = {self._nodes[field]}: {result.doc} "
                    f"({result.name})"
                )

    def _data_value(self, field: str, content: Content) -> Any:
        """Without time stamps: there are controllers that refuse to have theirs written."""
        kind = self._types[field]
        value = typed(content, kind.name, field=field, node=self._nodes[field])
        return self._ua.DataValue(self._ua.Variant(value, kind))

    def _await(self, doing: Coroutine[Any, Any, Result]) -> Result:
        """Have it done in asyncua's thread. Raises SinkError in words."""
        timeout_s = self._config.timeout_s
        self._is_sound = False
        try:
            result: Result = self._loop.post(asyncio.wait_for(doing, timeout_s))
        except SinkError as error:
            raise SinkError(f"{self.name}: {error}") from error
        except (asyncio.TimeoutError, concurrent.futures.TimeoutError) as error:
            hint = "" if self._config.security == "none" else _IMPOSTOR
            raise SinkError(f"{self.name}: no answer within {timeout_s:g} s{hint}") from error
        except self._failures as error:
            number = error.errno if isinstance(error, OSError) else None
            text = os.strerror(number) if number else str(error)
            raise SinkError(f"{self.name}: {text or type(error).__name__}") from error
        self._is_sound = True
        return result


async def _drop(client: Any) -> None:
    """Let go of a server that does not answer."""
    client.disconnect_socket()


async def _end_all() -> None:
    """End what asyncua still does in its thread, before that ends."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
