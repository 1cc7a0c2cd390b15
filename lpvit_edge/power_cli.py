"""The verbs `doctor` and `power`: what this machine can measure, and what it reads now."""

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from lpvit_edge.errors import EnvironmentUnfitError, UnknownOptionError

if TYPE_CHECKING:
    from rich.table import Table

    from lpvit_edge.doctor import Report
    from lpvit_profilers.base import PowerSample, PowerSource
    from lpvit_profilers.power_summary import PowerSummary, RailSummary

DOCTOR_SCHEMA = "lpvit.doctor/1"
POWER_SCHEMA = "lpvit.power/1"
_WIDTH = 80
_SECONDS = 2.0

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_Tdp = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        max=1999.0,
        help="TDP of the CPU in W: also show a power ESTIMATED from the load (not a measurement).",
    ),
]


def register(app: typer.Typer) -> None:
    """Add both verbs to the command line."""
    app.command()(doctor)
    app.command()(power)


def doctor(json: _Json = False, tdp_w: _Tdp = None) -> None:
    """Look at this machine: environment, engines and power sensors, each with a remedy.

    Exits with 3 when nothing here can run a model.

    Example: lpvit doctor --json
    """
    from lpvit_edge.doctor import examine

    report = examine(tdp_w=tdp_w)
    if json:
        _print_json(DOCTOR_SCHEMA, {**msgspec.to_builtins(report), "is_fit": report.is_fit})
    else:
        _print_tables(*_doctor_tables(report))
    if not report.is_fit:
        raise typer.Exit(3)


def power(
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="How long to read the sensors.", show_default=f"{_SECONDS:g}"),
    ] = None,
    json: _Json = False,
    replay: Annotated[
        Path | None,
        typer.Option(metavar="LOG", help="Read a recording, or a log of tegrastats, instead."),
    ] = None,
    interval: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds between the lines of a log without dates."),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the readings for --replay.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Read this source of `lpvit doctor`, not the best one."),
    ] = None,
    tdp_w: _Tdp = None,
) -> None:
    """Show what the power sensors read now, rail by rail.

    Exits with 3 when no rail gave any reading.

    Example: lpvit power --seconds 10 --record idle.jsonl

    Example: lpvit power --replay tegrastats.log --interval 0.1
    """
    live = {"--seconds": seconds, "--record": record, "--source": source, "--tdp-w": tdp_w}
    _refuse_live_options(replay, live, interval)
    if source is not None and tdp_w is not None:
        raise UnknownOptionError("--source reads a sensor, --tdp-w a model; give one of them")
    summary = (
        _replayed(replay, interval)
        if replay
        else _live(_source(source, tdp_w), seconds or _SECONDS, record)
    )
    if json:
        _print_json(POWER_SCHEMA, msgspec.to_builtins(summary))
    else:
        _print_tables(_power_table(summary))
    if not summary.rails:
        raise typer.Exit(3)


def _refuse_live_options(
    replay: Path | None, live: Mapping[str, object], interval_s: float | None
) -> None:
    """An option that would do nothing is a mistake, and not passed over."""
    if replay is None and interval_s is not None:
        raise UnknownOptionError("--interval describes a log; give one with --replay LOG")
    for option, value in live.items():
        if replay is not None and value is not None:
            raise UnknownOptionError(f"{option} reads a sensor, --replay a file; give one of them")


def _replayed(path: Path, interval_s: float | None) -> "PowerSummary":
    from lpvit_profilers.power_summary import summarise_power
    from lpvit_profilers.replay import named_replay, read_recording

    recording = named_replay(read_recording(path, interval_s=interval_s))
    return summarise_power(recording.info, recording.samples)


def _live(source: "PowerSource", seconds: float, record: Path | None) -> "PowerSummary":
    from lpvit_profilers.base import opened
    from lpvit_profilers.power_summary import summarise_power
    from lpvit_profilers.replay import recorded

    with opened(source):
        print_progress(f"reading {source.info.name} ({source.info.sensor}) for {seconds:g} s")
        samples = _samples(source, seconds)
        if record is not None:
            samples = recorded(record, source.info, samples)
        return summarise_power(source.info, samples)


def _source(name: str | None, tdp_w: float | None) -> "PowerSource":
    """The named or the best sensor; the estimate only where its TDP is stated and none measures."""
    from lpvit_profilers.detect import default_source, detect, source_named, why_none
    from lpvit_profilers.estimate import EstimatedSource

    if name is not None:
        return source_named(name)
    found = default_source()
    if found is not None:
        if tdp_w is not None:
            print_progress("a sensor measures here: --tdp-w is not used")
        return found
    if tdp_w is not None:
        return EstimatedSource(tdp_w=tdp_w)
    raise EnvironmentUnfitError(
        f"no power sensor can be read here. {why_none(detect())}. Latency can still be measured"
    )


def _samples(source: "PowerSource", seconds: float) -> "Iterator[PowerSample]":
    from lpvit_profilers.sampler import jittered, poll_interval_s

    poll_s, generator = poll_interval_s(source.info), random.Random()
    end_s, last_ns = time.monotonic() + seconds, -1
    if source.info.has_counter:
        source.sample()  # power made from a counter needs a first reading to start from
        time.sleep(poll_s)
    while time.monotonic() < end_s:
        sample = source.sample()
        if sample.t_ns > last_ns:
            last_ns = sample.t_ns
            yield sample
        time.sleep(jittered(poll_s, generator))


def print_progress(text: str) -> None:
    """One line on stderr, so that stdout holds only the result."""
    sys.stderr.write(f"{text}\n")


def _print_json(schema: str, content: Mapping[str, Any]) -> None:
    encoded = msgspec.json.encode({"schema": schema, **content})
    sys.stdout.write(msgspec.json.format(encoded, indent=1).decode() + "\n")


def _print_tables(*tables: "Table") -> None:
    from rich.console import Console

    console = Console(width=_WIDTH, highlight=False)
    for table in tables:
        console.print(table)


def _doctor_tables(report: "Report") -> "Sequence[Table]":
    colour = {"ok": "green", "optional": "dim", "warning": "yellow", "unfit": "red"}
    findings = _table(f"device {report.fingerprint}", "what", "", "found, and what to do")
    for f in report.findings:
        text = f.found if f.remedy is None else f"{f.found}\n→ {f.remedy}"
        findings.add_row(f.name, f"[{colour[f.status]}]{f.status}[/]", _plain(text))
    sources = _table("power sources, best first", "source", "", "why")
    for s in report.sources:
        sources.add_row(s.name, "[green]yes[/]" if s.usable else "[dim]no[/]", _plain(s.reason))
    return findings, sources


def _plain(text: str) -> str:
    """Brackets of a message are not rich's markup."""
    from rich.markup import escape

    return escape(text)


def _power_table(summary: "PowerSummary") -> "Table":
    energy = "" if summary.energy_mj is None else f", {summary.energy_mj / 1000:.3g} J"
    title = (
        f"{summary.source}: {summary.samples} readings in {summary.duration_s:.2f} s{energy}"
        f" ({summary.failed} failed)"
    )
    table = _table(_plain(title), "rail, W", "now", "mean", "min", "max")
    for rail in summary.rails:
        table.add_row(_plain(rail.name), *_watts(rail))
    table.add_section()
    if summary.total is None:
        table.add_row("total", "unknown")
    else:
        table.add_row(f"total, {summary.quality}", *_watts(summary.total))
    caption = [f"total = {summary.total_rule}, covers {summary.scope}", summary.reason]
    table.caption = _plain("; ".join(text for text in (*caption, *summary.notes) if text))
    return table


def _watts(rail: "RailSummary") -> tuple[str, ...]:
    values = (rail.last_mw, rail.mean_mw, rail.min_mw, rail.max_mw)
    return tuple(f"{value / 1000:.3f}" for value in values)


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        numeric = len(columns) > 3 and number > 0
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    return table
