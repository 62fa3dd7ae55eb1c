"""What a run writes while it goes on.

metrics.jsonl holds results only and is the same, byte for byte, when a run is repeated; times go to timings.jsonl. Both
are JSON lines, flushed as they are written. Boards show the same values.
"""

import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from oat_dist.boards import Board, open_boards
from oat_dist.config import Config
from oat_dist.weights import whole_file


def keep_metrics_until(run: pathlib.Path, step: int) -> None:
    """Drop the lines after a step, which a run that goes on from there will write again; a half-written line goes too.

    Args:
        run: Folder of the run.
        step: Last step that stays.
    """
    for name in ("metrics", "timings"):
        path = run / f"{name}.jsonl"
        if path.exists():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            with whole_file(path) as temporary:
                temporary.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))


def open_metrics(config: Config, run: pathlib.Path, *, is_main: bool) -> "MetricsWriter":
    """The metrics of a run with the boards it asks for; on other ranks than the main one, of nothing.

    Args:
        config: Configuration of the run.
        run: Its folder.
        is_main: Whether this rank writes.
    """
    return MetricsWriter(run, open_boards(config, run)) if is_main else MetricsWriter(None)


class MetricsWriter:
    """Writes metrics of one run; a context manager."""

    def __init__(self, run: pathlib.Path | None, boards: Sequence[Board] = ()) -> None:
        """Open the files.

        Args:
            run: Folder of the run; None on ranks that write nothing.
            boards: Where values are shown too.
        """
        self._files = [(run / f"{name}.jsonl").open("a") for name in ("metrics", "timings")] if run else []
        self._boards = list(boards)
        self._start = self._last = time.perf_counter()

    def write(
        self,
        step: int,
        values: dict[str, float],
        *,
        images: int | None = None,
        timing: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Write one line.

        Args:
            step: Optimiser steps done.
            values: Name -> value.
            images: Training images since the last line with a number of images, over all ranks; for the throughput.
            timing: More for timings.jsonl.

        Returns:
            What went to timings.jsonl.
        """
        now, timing = time.perf_counter(), dict(timing or {})
        if images is not None:
            timing |= {"elapsed_s": now - self._start, "images_per_s": images / (now - self._last)}
            self._last = now
        for file, part in zip(self._files, (values, {k: round(v, 3) for k, v in timing.items()}), strict=False):
            if part:
                file.write(json.dumps({"step": step, **part}) + "\n")
                file.flush()
        for board in self._boards:
            board.show({**values, **timing}, step)
        return timing

    def __enter__(self) -> "MetricsWriter":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        for board in self._boards:
            board.close()
