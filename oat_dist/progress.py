"""Progress bars: on the main rank, on a terminal, and nowhere else."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def progress_bar(
    description: str, total: int, *, is_main: bool, done: int = 0
) -> Iterator[Callable[[str | None], None]]:
    """Show a bar on standard error while the block runs.

    Args:
        description: Text before the bar.
        total: Number of advances.
        is_main: Whether this rank may draw.
        done: Advances made before.

    Yields:
        A function that advances by one and, given a text, changes the description.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (is_main and console.is_terminal)) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda text=None: bar.update(task, advance=1, description=text)


@contextlib.contextmanager
def byte_bar(description: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
    """Show the progress of a download on standard error, if that is a terminal.

    Args:
        description: Text before the bar.
        total: Bytes of the whole; 0 when unknown.
        start: Bytes that are there already.

    Yields:
        A function that advances by a number of bytes.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total or None, completed=start)
        yield lambda num_bytes: bar.advance(task, num_bytes)
