"""The [[sink]] tables of line.toml, one for each kind."""

from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Kind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """A table that its `kind` tells apart."""

    target: str


class JsonlSink(Kind, frozen=True, kw_only=True, tag="jsonl"):
    """One JSON object a line."""


class EvidenceSink(Kind, frozen=True, kw_only=True, tag="evidence"):
    """A folder of images of rejected and of doubtful parts, with an index."""

    below: float = 0.8  # confidence under which an accepted part is kept too
    max_gb: Positive = 2.0
    max_days: Positive = 30.0


class WebhookSink(Kind, frozen=True, kw_only=True, tag="webhook"):
    """`target` is the address that each batch is posted to."""

    token: str | None = None  # sent as a bearer token
    timeout_s: Positive = 10.0


class MqttSink(Kind, frozen=True, kw_only=True, tag="mqtt"):
    """`target` is mqtt://user:${NAME}@host:1883/topic, mqtts:// for TLS."""

    client_id: str | None = None  # None: made from the topic
    ca: str | None = None  # certificates to trust, PEM; None: the system's
    certificate: str | None = None  # of this client, PEM
    key: str | None = None
    timeout_s: Positive = 5.0


SinkConfig = JsonlSink | EvidenceSink | WebhookSink | MqttSink
