"""Time, memory and repetition: what the benchmarks share and torch does not bring."""

import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from table import cpu_bf16_instructions

from oat_dist.stopwatch import Stopwatch, status_mib

__all__ = [
    "PeakMemory",
    "Stopwatch",
    "choose_precision",
    "has_bf16",
    "in_turns",
    "last_line_of",
    "ratios",
    "spread",
    "wait_for",
]

_MIB = 2**20


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
            self._before = status_mib("VmRSS")

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
        return {"peak_mib": status_mib("VmHWM") - self._before}


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
