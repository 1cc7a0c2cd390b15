"""How the GPU benchmarks keep their rows: after each part, whatever ends the run."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks.gpu_rounds import ROUNDS, DeviceLostError
from lpvit_edge.files import write_atomic

RowT = TypeVar("RowT")
EntrantT = TypeVar("EntrantT")
RUNNING = "the run was going on when this was written"


def collected(
    parts: Iterable[list[RowT]], *, write: Callable[[tuple[RowT, ...], str | None], object]
) -> tuple[tuple[RowT, ...], str | None]:
    """All rows, and why they are not all that was asked for, if so.

    write gets both after every part, so that a run that is killed leaves the parts before. A lost
    device and Ctrl-C end the run and keep its rows; other errors end it with what was written.
    """
    rows: list[RowT] = []
    unfinished: str | None = None
    try:
        for part in parts:
            rows += part
            write(tuple(rows), RUNNING)
    except DeviceLostError as lost:
        unfinished = str(lost)
    except KeyboardInterrupt:
        unfinished = "interrupted"
    write(tuple(rows), unfinished)
    return tuple(rows), unfinished


def save(table: msgspec.Struct, path: Path | None) -> None:
    """Write a table whole or not at all; None where none was asked for."""
    if path is not None:
        write_atomic(path, msgspec.json.encode(table) + b"\n")


def ended(unfinished: str | None) -> int:
    """The exit status of a run, with a word to the one who reads the terminal."""
    if unfinished is None:
        return 0
    print(f"unfinished: {unfinished}", file=sys.stderr)
    return 1


def with_common(
    parser: argparse.ArgumentParser, *, dtypes: Sequence[str]
) -> argparse.ArgumentParser:
    """The options of every comparison of contestants."""
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--dtype", default="float16", choices=dtypes)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="TEXT",
        help="leave out contestants with this in their name, such as one that loses the device",
    )
    parser.add_argument("--json", type=writable)
    return parser


def writable(text: str) -> Path:
    """The value of --json, refused before hours of measuring and not after them."""
    path = Path(text)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text} cannot be written: name a file in a folder that exists and can be written to"
        )
    return path


def without(entrants: dict[str, EntrantT], skipped: list[str]) -> dict[str, EntrantT]:
    """The entrants whose names hold no skipped text, and dense, to which all are compared."""
    return {
        name: entrant
        for name, entrant in entrants.items()
        if name.startswith("dense") or not any(text in name for text in skipped)
    }
