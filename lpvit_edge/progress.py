"""Progress bars on stderr, so that stdout stays for results."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lpvit_edge.distributed import is_main

T = TypeVar("T")


def _console() -> Console:
    """Of several processes only the first one shows anything."""
    return Console(stderr=True, quiet=not is_main())


def track(items: Iterable[T], *, what: str, total: int) -> Iterator[T]:
    """Yield the items while a bar shows how many are done and how long the rest will take."""
    with Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=_console(),
    ) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)


def say(text: str) -> None:
    """One line for the person at the terminal."""
    _console().print(text, style="yellow", soft_wrap=True, markup=False)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A bar without a count, and the time, for one long step."""
    with Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=_console(),
    ) as bar:
        task = bar.add_task(what, total=None)
        yield
        bar.update(task, total=1, completed=1)
