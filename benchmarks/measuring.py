"""Time, memory and repetition: what the benchmarks share and torch does not bring."""

import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from table import cpu_bf16_instructions

_MIB = 2**20
_STATUS = pathlib.Path("/proc/self/status")


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 with instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return cpu_bf16_instructions() not in ("none", "unknown")


def choose_precision(asked: str, device: torch.device) -> str:
    """`fp32` or `bf16`; `auto` is bf16 where the device has it."""
    return asked if asked != "auto" else ("bf16" if has_bf16(device) else "fp32")


def wait_for(device: torch.device) -> None:
    """Wait until a device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


class PeakMemory:
    """Largest memory of a stretch of this process: allocator statistics on a GPU, growth of resident memory on a CPU.

    A CPU figure is honest only in a process that measures one thing: what the C library once took it rarely gives back.
    """

    def __init__(self, device: torch.device) -> None:
        """Remember how much there was before anything was built."""
        self._device = device
        self._before = 0.0
        if device.type != "cuda":
            _touch_libraries()
            self._before = _status_mib("VmRSS")

    def restart(self) -> None:
        """Forget the peak so far (first steps compile, tune and capture)."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            # 5: let VmHWM begin anew at the present size (man 5 proc).
            pathlib.Path("/proc/self/clear_refs").write_text("5")

    def read_mib(self) -> dict[str, float]:
        """`peak_mib`, and on a GPU `reserved_mib`: with fragments and the memory that CUDA graphs keep."""
        if self._device.type == "cuda":
            return {
                "peak_mib": torch.cuda.max_memory_allocated(self._device) / _MIB,
                "reserved_mib": torch.cuda.max_memory_reserved(self._device) / _MIB,
            }
        return {"peak_mib": _status_mib("VmHWM") - self._before}


def in_turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let every run take its turn, round after round, so that ratios within a round hold on a drifting machine.

    Args:
        runs: Name -> a function that runs once and gives its seconds.
        rounds: Rounds.

    Returns:
        Name -> seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    return seconds


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, smallest and largest of values, rounded."""
    named = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Ratio of each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def last_line_of(script: str, arguments: Sequence[str]) -> str:
    """Run a script of this folder in a process of its own and give the last line it prints.

    Raises:
        RuntimeError: It failed; with the end of what it wrote to standard error.
    """
    command = [sys.executable, str(pathlib.Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join([script, *arguments])}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def _touch_libraries() -> None:
    """Page in the code of convolutions, autograd and optimiser, which is memory of the libraries, not of a step."""
    network = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network(torch.rand(2, 16, 8, 8).contiguous(memory_format=memory_format)).sum().backward()
        optimizer.step()


def _status_mib(key: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024
