"""What line.toml says. Unknown keys are refused, with their place in the file.

On the command line a source or a sink is `kind:target?option=value&option=value`.
"""

import sys
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import parse_qsl

import msgspec

from lpvit_edge.deps import require
from lpvit_edge.drift.rules import Rules
from lpvit_edge.errors import FileFormatError, UnknownOptionError
from lpvit_edge.line.policy import Policy, PolicyName
from lpvit_edge.line.redact import redacted
from lpvit_edge.line.shadow_rule import ShadowRule
from lpvit_edge.line.sink_config import Kind, Positive, SinkConfig
from lpvit_edge.line.verdict import VerdictRule


class FolderSource(Kind, frozen=True, kw_only=True, tag="folder"):
    """A folder into which images are renamed."""

    poll_s: Positive = 0.05
    keep: bool = True  # in done/; otherwise they are deleted after their verdict


class VideoSource(Kind, frozen=True, kw_only=True, tag="video"):
    """A video file; `live` for a stream that must not end."""

    rate: Positive | None = None  # frames per second; None: as fast as they are judged
    live: bool = False


class V4l2Source(Kind, frozen=True, kw_only=True, tag="v4l2"):
    """A camera of the kernel."""

    rate: Positive | None = None
    size: str | None = None  # "1280x720"


class RtspSource(Kind, frozen=True, kw_only=True, tag="rtsp"):
    """A network camera; `target` may hold ${NAME} of the environment."""

    transport: Literal["tcp", "udp"] = "tcp"
    timeout_s: Positive = 4.0  # without a frame; then the stream is opened again


class GstreamerSource(Kind, frozen=True, kw_only=True, tag="gstreamer"):
    """`target` is a pipeline without its sink."""


class GenicamSource(Kind, frozen=True, kw_only=True, tag="genicam"):
    """`target` is the camera's serial number."""

    cti: str  # path of the GenTL producer
    # Set on the camera before it starts, in this order: {PixelFormat = "Mono8", TriggerMode = "On"}
    features: dict[str, bool | int | float | str] = msgspec.field(default_factory=dict)


class SyntheticSource(Kind, frozen=True, kw_only=True, tag="synthetic"):
    """`target` is file.py:function, a function from a number to an image."""

    rate: Positive = 30.0
    frames: int | None = None  # then the camera is unplugged


SourceConfig = (
    FolderSource | VideoSource | V4l2Source | RtspSource | GstreamerSource | GenicamSource
    | SyntheticSource
)  # fmt: skip


class LineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """line.toml."""

    source: SourceConfig
    sink: tuple[SinkConfig, ...] = ()
    policy: Policy = Policy()
    verdict: VerdictRule = VerdictRule()
    state: str = "line_state"  # folder of the journal and the frame numbers
    stall_s: Positive = 5.0  # silence of a capture process after which it is killed
    health: str | None = None  # host:port of /healthz and /readyz
    engine: str | None = None  # None: the one that the bundle was built with
    threads: int | None = None
    drift: Rules = Rules()  # used where the bundle has a reference
    shadow: ShadowRule | None = None  # a dense engine beside the line

    def __post_init__(self) -> None:
        """A stream that rests must be opened again before its process counts as wedged."""
        if isinstance(self.source, RtspSource) and self.source.timeout_s >= self.stall_s:
            raise ValueError(
                f"source.timeout_s is {self.source.timeout_s:g} and stall_s {self.stall_s:g}; the "
                "time after which a capture process is killed must be the longer one"
            )


ConfigT = TypeVar("ConfigT")


def read_config(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, not yet validated."""
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        content: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    return content


def line_config(tables: dict[str, Any], *, name: str) -> LineConfig:
    """Validate. Raises FileFormatError naming the key."""
    try:
        config = msgspec.convert(tables, LineConfig)
    except msgspec.ValidationError as error:
        raise FileFormatError(f"{name}: {redacted(str(error))}") from error
    _refuse_untellable(config, name)
    return _with_policy(config, name)


def _with_policy(config: LineConfig, name: str) -> LineConfig:
    """The kind of policy that fits the source, where none is named."""
    finite = isinstance(config.source, FolderSource | VideoSource)
    if config.policy.kind is None:
        kind: PolicyName = "wait" if finite else "newest"
        policy = msgspec.structs.replace(config.policy, kind=kind)
        return msgspec.structs.replace(config, policy=policy)
    if config.policy.kind == "newest" and isinstance(config.source, FolderSource):
        raise FileFormatError(
            f"{name}: policy.kind = 'newest' drops images, and one of a folder comes only once; "
            "use 'wait' or 'triggered'"
        )
    return config


def _refuse_untellable(config: LineConfig, name: str) -> None:
    """The safe verdict that a part gets at its deadline must still be told."""
    deadline_ms = config.policy.deadline_ms or 0.0
    for place, sink in enumerate(config.sink):
        for key in ("delay_ms", "max_age_ms"):
            limit_ms = getattr(sink, key, None)
            if limit_ms is not None and limit_ms <= deadline_ms:
                raise FileFormatError(
                    f"{name}: sink[{place}].{key} = {limit_ms:g} is not above deadline_ms = "
                    f"{deadline_ms:g}: the safe verdict of a late part would come too late for it"
                )


def parse_source(text: str) -> dict[str, Any]:
    """`kind:target?options` of a source; `rtsp://...` and `file.py:function@30` are known too."""
    if text.startswith(("rtsp://", "rtsps://")):
        return {"kind": "rtsp", "target": text}
    table = _parse(text, SourceConfig, "--source")
    if table["kind"] == "synthetic" and "@" in table["target"]:
        table["target"], _, rate = table["target"].rpartition("@")
        table["rate"] = rate
    return _typed(table, SourceConfig, "--source")


def parse_sink(text: str) -> dict[str, Any]:
    """`kind:target?options` of a sink; mqtt://... and other addresses name their kind."""
    scheme = text.partition("://")[0]
    if scheme in _KIND_OF:
        text = f"{_KIND_OF[scheme]}:{text}"
    return _typed(_parse(text, SinkConfig, "--sink"), SinkConfig, "--sink")


def _parse(text: str, union: Any, option: str) -> dict[str, Any]:
    kind, colon, rest = text.partition(":")
    kinds = [str(member.__struct_config__.tag) for member in union.__args__]
    if not colon or kind not in kinds:
        raise UnknownOptionError(
            f"{option} {redacted(text)!r}: write kind:target; kinds are {', '.join(kinds)}"
        )
    target, _, options = (rest, "", "") if kind in _WHOLE else rest.partition("?")
    table: dict[str, Any] = {"kind": kind, "target": target}
    for key, value in parse_qsl(options):
        inner, dot, name = key.partition(".")
        if dot:  # nodes.verdict=...
            table.setdefault(inner, {})[name] = value
        else:
            table[key] = value
    return table


_KIND_OF = {"modbus": "modbus", "mqtt": "mqtt", "mqtts": "mqtt", "opc.tcp": "opcua"}
_WHOLE = {"gstreamer", "webhook"}  # their targets may hold question marks


def _typed(table: dict[str, Any], union: Any, option: str) -> dict[str, Any]:
    try:
        found = msgspec.convert(table, union, strict=False)
    except msgspec.ValidationError as error:
        raise UnknownOptionError(f"{option} {table['kind']}: {redacted(str(error))}") from error
    typed: dict[str, Any] = msgspec.to_builtins(found)
    return typed
