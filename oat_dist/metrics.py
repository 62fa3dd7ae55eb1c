"""What a run writes while it goes on.

metrics.jsonl holds results only and is the same, byte for byte, when a run is repeated; times go to timings.jsonl. Both
are JSON lines, flushed as they are written. TensorBoard shows the same values.
"""

import json
import pathlib
import time
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

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


class MetricsWriter:
    """Writes metrics of one run; a context manager."""

    def __init__(self, run: pathlib.Path | None, *, tensorboard: bool) -> None:
        """Open the files.

        Args:
            run: Folder of the run; None on ranks that write nothing.
            tensorboard: Whether to write TensorBoard event files too.
        """
        self._files = [(run / f"{name}.jsonl").open("a") for name in ("metrics", "timings")] if run else []
        self._board = SummaryWriter(str(run / "tensorboard")) if run and tensorboard else None
        self._start = self._last = time.perf_counter()

    def write(self, step: int, values: dict[str, float], *, images: int | None = None) -> None:
        """Write one line.

        Args:
            step: Optimiser steps done.
            values: Name -> value.
            images: Training images since the last line with a number of images, over all ranks; for the throughput.
        """
        now, timing = time.perf_counter(), {}
        if images is not None:
            timing = {"elapsed_s": now - self._start, "images_per_s": images / (now - self._last)}
            self._last = now
        for file, part in zip(self._files, (values, {k: round(v, 3) for k, v in timing.items()}), strict=False):
            if part:
                file.write(json.dumps({"step": step, **part}) + "\n")
                file.flush()
        if self._board is not None:
            for name, value in {**values, **timing}.items():
                self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()
