"""A torch.profiler trace of a few steps, for chrome://tracing or ui.perfetto.dev."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_WAIT, _WARM_UP = 1, 1


@contextlib.contextmanager
def profiled_steps(folder: pathlib.Path, rank: int, steps: int) -> Iterator[Callable[[], None]]:
    """Record steps, after two that prepare and warm up.

    Args:
        folder: Folder of the run; the trace is profile/rank<rank>.json in it.
        rank: This rank.
        steps: How many; 0 records nothing.

    Yields:
        A function to call after every step.
    """
    if not steps:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])

    def write(trace: profile) -> None:
        path = folder / f"profile/rank{rank}.json"
        path.parent.mkdir(exist_ok=True)
        trace.export_chrome_trace(str(path))

    when = schedule(wait=_WAIT, warmup=_WARM_UP, active=steps, repeat=1)
    with profile(activities=activities, schedule=when, on_trace_ready=write) as recording:
        yield recording.step
