"""The verb `install`: a bundle into the store of this device, proven before it is promoted."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

INSTALL_SCHEMA = "lpvit.install/1"


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(install)


def install(
    bundle: Annotated[Path, typer.Argument(help="The folder that `optimize` or `build` left.")],
    store: Annotated[Path, typer.Option(help="Folder of this device's bundles.")],
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Install the run's dense.onnx as the bundle to fall back on."),
    ] = False,
    other_device: Annotated[
        bool, typer.Option("--other-device", help="Install a bundle that was built elsewhere.")
    ] = False,
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="The same, and build its TensorRT engine again here."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Copy a bundle into the store and promote it once its engine answered the golden frames here.

    A running `lpvit run --store` takes it over without a stop; what ran before is kept as
    `previous`. A bundle that does not answer as it was built changes nothing: exit code 1. With
    --rebuild the line goes on with the old engine while a new one is built for this device.

    Example: lpvit install runs/demo --store /var/lib/lpvit/store
    """
    from lpvit_edge.bundle import Bundle, refuse_other_device
    from lpvit_edge.dense_bundle import dense_bundle
    from lpvit_edge.progress import working
    from lpvit_edge.proof import proven_engine
    from lpvit_edge.store import BundleStore

    def prove(copy: Bundle) -> None:
        if not (other_device or rebuild):
            refuse_other_device(copy)
        with working("install: golden frames"):
            proven_engine(msgspec.structs.replace(copy, rebuild=rebuild)).close()

    kept = BundleStore(store)
    if dense:
        with dense_bundle(bundle, rebuild=rebuild) as folder:
            installed = kept.install(folder, prove, role="dense")
    else:
        installed = kept.install(bundle, prove)
    record = kept.record()
    if json:
        content = {
            "schema": INSTALL_SCHEMA, "version": installed.version,
            "folder": str(installed.folder),
            **{role: getattr(record, role) for role in ("current", "previous", "dense")},
        }  # fmt: skip
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(content), indent=1).decode())
        sys.stdout.write("\n")
        return
    role = "dense" if dense else "current"
    sys.stdout.write(f"{installed.version} is the {role} bundle of {store}\n")
