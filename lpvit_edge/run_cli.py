"""The verb `run`: a bundle behind a camera."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

if TYPE_CHECKING:
    from lpvit_edge.line.bundles import Bundles
    from lpvit_edge.line.config import LineConfig
    from lpvit_edge.line.service import Served

RUN_SCHEMA = "lpvit.run/1"
# By kind of sink, what it leaves at the end where no later run can tell it.
_LEFT = {
    "evidence": "images not written; they are lost",
    "gpio": "pulses not given; their parts were not rejected",
    "journal": "entries that no disk took; they are lost",
    "modbus": "entries not told; they are too old for the next run",
    "opcua": "entries not told; they are too old for the next run",
}


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(run)


def run(
    bundle: Annotated[
        Path | None, typer.Argument(help="The folder that `optimize` or `build` left.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Run what `lpvit install` put here, instead of BUNDLE.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="kind:target, such as folder:/data/in or v4l2:/dev/video0.")
    ] = None,
    sink: Annotated[
        list[str] | None, typer.Option(help="kind:target?option=value; may be given again.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="line.toml; options here win.")] = None,
    policy: Annotated[str | None, typer.Option(help="newest, wait or triggered.")] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Trigger to verdict; later: the safe verdict.")
    ] = None,
    accept: Annotated[str | None, typer.Option(help="Labels of good parts, by comma.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Folder of the journal (default line_state).")
    ] = None,
    health: Annotated[str | None, typer.Option(help="host:port of /healthz and /readyz.")] = None,
    dashboard: Annotated[
        str | None, typer.Option(help="host:port of the page with power, verdicts and drift.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the page's token; made up when needed."),
    ] = None,
    shadow: Annotated[
        str | None, typer.Option(help="A denser bundle beside the line: its folder, or dense.")
    ] = None,
    shadow_share: Annotated[
        float | None, typer.Option(help="Of the frames, judged by it too (default 0.02).")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Stop after so long.")] = None,
    other_device: Annotated[
        bool, typer.Option("--other-device", help="Run a bundle that was built elsewhere.")
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="The same, and build its TensorRT engine again here."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Judge every frame of a source and deliver the verdicts, until it ends or SIGTERM comes.

    Example: lpvit run runs/demo --source synthetic:examples/factory_line/camera.py:frame@30
    --policy triggered --deadline-ms 100 --sink jsonl:line_state/verdicts.jsonl
    """
    from lpvit_edge.dashboard_cli import page_token
    from lpvit_edge.errors import UnknownOptionError
    from lpvit_edge.line.service import serve_line
    from lpvit_edge.line.state_lock import locked

    settings = _config(
        config, source=source, sinks=sink, policy=policy, deadline_ms=deadline_ms, accept=accept,
        state=state, health=health, shadow=shadow, shadow_share=shadow_share,
    )  # fmt: skip
    if dashboard is None and token_file is not None:
        raise UnknownOptionError("--token-file is for the page; give --dashboard host:port too")
    token = None if dashboard is None else page_token(dashboard, token_file)
    with locked(Path(settings.state)):
        bundles = _bundles(bundle, store, settings, other_device, rebuild)
        served = serve_line(
            bundles, settings, page=dashboard, token=token, said=token_file is None,
            seconds=seconds,
        )  # fmt: skip
    _print(served, json)


def _bundles(
    bundle: Path | None,
    store: Path | None,
    settings: "LineConfig",
    other_device: bool,
    rebuild: bool,
) -> "Bundles":
    from lpvit_edge.errors import UnknownOptionError
    from lpvit_edge.line.bundles import OneBundle
    from lpvit_edge.line.stored_bundles import StoredBundles
    from lpvit_edge.store import BundleStore

    named = settings.drift.fallback
    if store is not None and bundle is None:
        if named is not None:
            raise UnknownOptionError(
                f"[drift] fallback = {named!r}: with --store the denser bundle is the store's; "
                "put it there with `lpvit install --dense`"
            )
        return StoredBundles(BundleStore(store), other_device=other_device, rebuild=rebuild)
    if bundle is None or store is not None:
        raise UnknownOptionError("give either a BUNDLE or --store DIR")
    fallback = None if named is None else Path(named)
    return OneBundle(bundle, fallback=fallback, other_device=other_device, rebuild=rebuild)


def _config(path: Path | None, *, sinks: list[str] | None, **options: Any) -> "LineConfig":
    """line.toml with the options of the command line in their places."""
    from lpvit_edge.errors import UnknownOptionError
    from lpvit_edge.line.config import line_config, parse_sink, parse_source, read_config

    tables = {} if path is None else read_config(path)
    if options["source"] is not None:
        tables["source"] = parse_source(options["source"])
    if "source" not in tables:
        raise UnknownOptionError("no source: give --source kind:target, or --config line.toml")
    if sinks:
        tables["sink"] = [parse_sink(text) for text in sinks]
    inner = {"policy": ("policy", "kind"), "deadline_ms": ("policy", "deadline_ms")}
    for option, (table, key) in inner.items():
        if options[option] is not None:
            tables[table] = {**tables.get(table, {}), key: options[option]}
    if options["accept"] is not None:
        names = [name.strip() for name in options["accept"].split(",")]
        tables["verdict"] = {**tables.get("verdict", {}), "accept": names}
    for option, key in (("shadow", "bundle"), ("shadow_share", "share")):
        if options[option] is not None:
            tables["shadow"] = {**tables.get("shadow", {}), key: options[option]}
    for option in ("state", "health"):
        if options[option] is not None:
            tables[option] = options[option]
    return line_config(tables, name=str(path or "command line"))


def _print(served: "Served", json: bool) -> None:
    summary, left, shadow = served.summary, served.undelivered, served.shadow
    if json:
        content = {
            "schema": RUN_SCHEMA,
            **msgspec.to_builtins(summary),
            "undelivered": left,
            "shadow": msgspec.to_builtins(shadow),
        }
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(content), indent=1).decode())
        sys.stdout.write("\n")
        return
    times = " / ".join(
        "-" if value is None else f"{value:.2f}"
        for value in (summary.p50_ms, summary.p99_ms, summary.p999_ms)
    )
    sys.stdout.write(
        f"{summary.frames} frames: {summary.ok} ok, {summary.reject} reject, {summary.safe} safe "
        f"({summary.late} late, {summary.overflowed} overflow), {summary.dropped} dropped\n"
        f"trigger to verdict p50 / p99 / p99.9: {times} ms\n"
    )
    if shadow is not None:
        sys.stdout.write(
            f"dense engine beside: {shadow.compared} compared, {shadow.agreed} agreed, "
            f"{shadow.escapes} escapes, {shadow.overkills} overkills, {shadow.other} other labels, "
            f"{shadow.dropped} dropped, {shadow.failed} failed\n"
        )
    for name, count in left.items():
        what = _LEFT.get(
            name.partition(" ")[0], "entries not delivered yet; the next run sends them"
        )
        sys.stdout.write(f"{name}: {count} {what}\n")
