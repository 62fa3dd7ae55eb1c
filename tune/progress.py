"""The live table of a search: on a terminal it is redrawn, elsewhere every trial that ends is one line."""

import json
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

_MOST_ROWS = 24


class LiveTable:
    """Trials of one phase while they run; a context manager."""

    def __init__(self, title: str, total: int, console: Console | None = None) -> None:
        """Show nothing yet.

        Args:
            title: What the trials are.
            total: How many there will be.
            console: Where to; default: standard output.
        """
        self.title, self.total, self.console = title, total, console or Console()
        self._rows: dict[str, list[str]] = {}
        self._ended = 0
        self._start = time.monotonic()
        self._live = Live(console=self.console, refresh_per_second=2) if self.console.is_terminal else None

    def event(self, trial: str, event: str, job: dict, metrics: dict) -> None:
        """Take note of what happened to a trial; see `tune.cluster.run_jobs`."""
        what = _describe(job)
        epoch, ratio = metrics.get("epoch"), metrics.get("ratio")
        points = metrics.get("points") or []
        shown = " ".join(f"{100 * p['sa']:.0f}/{100 * p['ra']:.0f}" for p in points[:8])
        self._rows[trial] = [trial[-8:], event, "" if epoch is None else str(epoch),
                             "" if ratio is None else f"{ratio:.3f}", shown, what]  # fmt: skip
        if event in ("finished", "failed"):
            self._ended += 1
            if self._live is None:
                score = "" if ratio is None else f" ratio {ratio:.3f} at epoch {epoch},"
                seconds = time.monotonic() - self._start
                print(f"{self.title} {self._ended}/{self.total} {event},{score} {what} ({seconds:.0f} s)", flush=True)
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        seconds = time.monotonic() - self._start
        table = Table(title=f"{self.title}: {self._ended} of {self.total} ended, {seconds:.0f} s")
        for name in ("trial", "state", "epoch", "ratio", "SA/RA %, by lambda", "settings"):
            table.add_column(name, overflow="fold")
        for row in list(self._rows.values())[-_MOST_ROWS:]:
            table.add_row(*row)
        return table

    def __enter__(self) -> "LiveTable":
        """Begin to draw."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last table standing."""
        if self._live is not None:
            self._live.stop()


def _describe(job: dict) -> str:
    if job["kind"] == "dedicated":
        return f"lambda {job['lam']:g}, seed {job['seed']}"
    sample = ", ".join(
        f"{key.rpartition('.')[2]} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in job["sample"].items()
    )
    return sample + (f", seed {job['seed']}" if "seed" in job else "")
