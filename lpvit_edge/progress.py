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

T = TypeVar("T")


def track(items: Iterable[T], *, what: str, total: int) -> Iterator[T]:
    """Yield the items while a bar shows how many are done and how long the rest will take."""
    with Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)


def say(text: str) -> None:
    """One line for the person at the terminal."""
    Console(stderr=True).print(text, style="yellow", soft_wrap=True, markup=False)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A bar without a count, and the time, for one long step."""
    with Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(what, total=None)
        yield
        bar.update(task, total=1, completed=1)
