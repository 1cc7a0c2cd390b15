"""Where verdicts go, by the `kind` of a [[sink]] table.

A direct sink is told each verdict at once, in the line's own thread (a reject line). A remote sink
reads the journal in a thread of its own, in order, and tries again what was refused; the line
never waits for it.
"""

from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from lpvit_edge.errors import UnknownOptionError
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.sink_config import EvidenceSink, GpioSink, JsonlSink, SinkConfig
from lpvit_edge.line.sinks.base import Remote, Sink
from lpvit_edge.line.sinks.remote import RemoteSink

__all__ = ["Sink", "open_sinks"]

_DIRECT = {
    "evidence": "lpvit_edge.line.sinks.evidence:EvidenceStore",
    "gpio": "lpvit_edge.line.sinks.gpio:GpioReject",
}
_REMOTE = {
    "jsonl": "lpvit_edge.line.sinks.jsonl:JsonLines",
    "modbus": "lpvit_edge.line.sinks.modbus:Modbus",
    "mqtt": "lpvit_edge.line.sinks.mqtt:Mqtt",
    "opcua": "lpvit_edge.line.sinks.opcua:OpcUa",
    "webhook": "lpvit_edge.line.sinks.webhook:Webhook",
}


def open_sinks(configs: tuple[SinkConfig, ...], journal: Journal) -> tuple[Sink, ...]:
    """Make the sinks, held until the line says otherwise.

    Raises MissingDependencyError without a sink's library, UnknownOptionError, SinkError.
    """
    remotes = {id(config): _remote(config) for config in configs if _kind(config) in _REMOTE}
    _refuse_twice(remote.name for remote in remotes.values())
    _refuse_twice(place for config in configs if (place := _place(config)) is not None)
    sinks = tuple(
        RemoteSink(remotes[id(config)], journal, is_held=True)
        if id(config) in remotes
        else _direct(config)
        for config in configs
    )
    journal.forget_other_sinks(sink.name for sink in sinks)
    return sinks


def _refuse_twice(names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise UnknownOptionError(
                f"two sinks are called {name}, and one would be taken for the other; leave one "
                "out, or write them so that they differ in more than a password"
            )


def _place(config: SinkConfig) -> str | None:
    """What a sink of this machine writes to, however it is spelt; None for one behind a wire."""
    if isinstance(config, GpioSink):
        return f"gpio {config.target} line {config.line}"
    if isinstance(config, JsonlSink | EvidenceSink):
        return f"{_kind(config)} {Path(config.target).resolve()}"
    return None


def _kind(config: SinkConfig) -> str:
    return str(config.__struct_config__.tag)


def _remote(config: SinkConfig) -> Remote:
    remote: Remote = _load(_REMOTE[_kind(config)])(config)
    return remote


def _direct(config: SinkConfig) -> Sink:
    sink: Sink = _load(_DIRECT[_kind(config)])(config)
    return sink


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
