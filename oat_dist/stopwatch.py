"""Where the time of steps goes, and how much memory they take; nothing here makes the host wait for the device."""

import pathlib
import time

import torch

_MIB = 2**20
_STATUS = pathlib.Path("/proc/self/status")


class Stopwatch:
    """Splits the time of steps into named phases; on a GPU by events in its queue, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        """Stop nothing yet."""
        self._is_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """Begin a step; what lies between the last step and this one is counted nowhere."""
        self._marks.append((None, self._now()))

    def mark(self, phase: str) -> None:
        """All since the last call belongs to `phase`."""
        self._marks.append((phase, self._now()))

    def read_ms(self) -> dict[str, float]:
        """Milliseconds of each phase since the last call, summed over steps; the device must have been waited for."""
        total: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                ms = before.elapsed_time(after) if self._is_gpu else 1000 * (after - before)
                total[phase] = total.get(phase, 0.0) + ms
        self._marks = []
        return total

    def _now(self) -> torch.cuda.Event | float:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far: of torch's allocator on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    return status_mib("VmHWM")


def status_mib(key: str) -> float:
    """A size in /proc/self/status (proc(5)), or 0 where Linux does not tell it."""
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), 0.0)
