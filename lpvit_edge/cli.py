"""The command line: parse, load, one library call, save, say one line.

Imports of stages live inside the commands, so that `lpvit --help` works on any machine.
"""

import sys

import typer

from lpvit_edge import __version__, power_cli
from lpvit_edge.errors import LpvitEdgeError

app = typer.Typer(
    name="lpvit",
    help="Measure this device, prune a Vision Transformer for it, build an engine, prove the gain.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options of every verb."""


power_cli.register(app)


def main() -> int:
    """Run one command. Exit codes: see lpvit_edge.errors; 0 done, 2 wrong usage."""
    try:
        app()
    except LpvitEdgeError as error:
        print(f"lpvit: {error}", file=sys.stderr)
        return error.exit_code
    return 0
