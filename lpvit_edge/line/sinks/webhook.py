"""Verdicts and events posted to an address as a JSON array, in order, until it answers 2xx."""

from collections.abc import Sequence
from typing import Any

import msgspec

from lpvit_edge.deps import require
from lpvit_edge.errors import SinkError, UnknownOptionError
from lpvit_edge.line.journal import Entry, as_json
from lpvit_edge.line.redact import address_name, from_environment
from lpvit_edge.line.sink_config import WebhookSink


class Webhook:
    """The header Idempotency-Key names the first and last entry: a repeated post is recognised."""

    batch = 50
    longest_wait_s = 15.0
    missed = 0

    def __init__(self, config: WebhookSink) -> None:
        self.name = f"webhook {address_name(config.target)}"
        self._url = from_environment(config.target)
        self._token = None if config.token is None else from_environment(config.token)
        if self._token is not None and not self._token.isascii():
            raise UnknownOptionError(f"{self.name}: the token holds a letter that is not ASCII")
        self._timeout_s = config.timeout_s
        self._httpx = require("httpx")
        self._client: Any = None

    def resume(self, delivered: int, newest: int) -> int:
        """Only the journal knows."""
        return delivered

    def too_old(self, entries: Sequence[Entry]) -> int:
        """Nothing is ever too old."""
        return 0

    def send(self, entries: Sequence[Entry]) -> None:
        """Post the entries. Raises SinkError for any answer but 2xx."""
        if self._client is None:
            self._client = self._httpx.Client(timeout=self._timeout_s)
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": f"{entries[0].id}-{entries[-1].id}",
        }
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        body = msgspec.json.encode([msgspec.Raw(as_json(entry)) for entry in entries])
        try:
            answer = self._client.post(self._url, content=body, headers=headers)
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            raise SinkError(f"{self.name}: {type(error).__name__}") from error
        if not answer.is_success:
            raise SinkError(f"{self.name}: answered {answer.status_code}")

    def beat(self, *, is_held: bool) -> None:
        """An address has no safe position; the event of the outage was posted."""

    def disconnect(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None
