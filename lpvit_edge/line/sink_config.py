"""The [[sink]] tables of line.toml, one for each kind."""

from typing import Annotated, Literal

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Word = Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Kind(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """A table that its `kind` tells apart."""

    target: str


class JsonlSink(Kind, frozen=True, kw_only=True, tag="jsonl"):
    """One JSON object a line."""


class EvidenceSink(Kind, frozen=True, kw_only=True, tag="evidence"):
    """A folder of images of rejected and of doubtful parts, with an index."""

    below: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.8  # confidence; also kept if accepted
    max_gb: Positive = 2.0
    max_days: Positive = 30.0  # on which the line ran, beside today
    min_free_gb: Annotated[float, msgspec.Meta(ge=0)] = 0.5  # of the disk, which others need


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


class ModbusSink(Kind, frozen=True, kw_only=True, tag="modbus"):
    """`target` is modbus://host:502; addresses count from 0 (40001 of a manual is register 0)."""

    register: Word = 0  # the first of the map
    coil: Word | None = None  # the first of two; None: no coils are written
    unit: Annotated[int, msgspec.Meta(ge=0, le=255)] = 1
    word_order: Literal["high first", "low first"] = "high first"  # of numbers of 32 bits
    max_age_ms: Positive = 500.0  # from the trigger; an older verdict is not told any more
    timeout_s: Positive = 1.0


class OpcUaNodes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which node gets what; None: it is not written."""

    number: str | None = None  # of the part; written after all else
    part: str | None = None  # what the source calls the part
    verdict: str | None = None  # ok, reject, safe, or 1, 2, 3
    action: str | None = None  # pass, reject, or 1, 2
    reject: str | None = None  # of a Boolean: reject the newest part
    label: str | None = None
    confidence: str | None = None
    reason: str | None = None
    age_ms: str | None = None  # from the trigger
    heartbeat: str | None = None
    state: str | None = None  # offline, online, held, or 0, 1, 2
    judging: str | None = None  # of a Boolean: state is online
    ok_count: str | None = None
    reject_count: str | None = None
    safe_count: str | None = None
    missed_count: str | None = None


class OpcUaSink(Kind, frozen=True, kw_only=True, tag="opcua"):
    """`target` is opc.tcp://user:${NAME}@host:4840/path."""

    nodes: OpcUaNodes
    security: Literal["none", "Basic256Sha256", "Aes128Sha256RsaOaep", "Aes256Sha256RsaPss"] = (
        "none"
    )
    mode: Literal["Sign", "SignAndEncrypt"] = "SignAndEncrypt"
    certificate: str | None = None  # of this client, PEM or DER
    key: str | None = None
    server_certificate: str | None = None  # the one to trust
    application_uri: str = "urn:lpvit-edge:line"  # as it stands in `certificate`
    max_age_ms: Positive = 500.0  # from the trigger; an older verdict is not told any more
    timeout_s: Positive = 2.0


class GpioSink(Kind, frozen=True, kw_only=True, tag="gpio"):
    """`target` is the chip, /dev/gpiochip0."""

    line: int | str  # offset or name
    delay_ms: Positive  # from the trigger to the pulse
    pulse_ms: Positive = 50.0
    tolerance_ms: Positive = 10.0  # a pulse that could only begin later is not given
    active_low: bool = False
    drive: Literal["push pull", "open drain", "open source"] = "push pull"
    safe: Literal["inactive", "active"] = "inactive"  # while no part can be judged


SinkConfig = (
    JsonlSink | EvidenceSink | WebhookSink | MqttSink | ModbusSink | OpcUaSink | GpioSink
)  # fmt: skip
