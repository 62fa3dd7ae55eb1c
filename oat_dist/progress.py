"""Progress bars: on the main rank, on a terminal, and nowhere else."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
