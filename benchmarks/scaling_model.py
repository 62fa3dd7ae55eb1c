"""A model of weak-scaling efficiency, held against what `scaling.py` measured on two processes.

    python benchmarks/scaling_model.py [--measured benchmarks/results/scaling.csv]

A step of R processes takes what the slowest computes, plus what communication does not hide behind the backward pass:

    t(R) = c + s c sqrt(2 ln R) + max(0, 2 (R-1)/R P/W + 2 (R-1) L n - o c)        efficiency(R) = c / t(R)

c: seconds a process computes; s: standard deviation of c between processes as a share of it (the largest of R normal
ones lies about sqrt(2 ln R) deviations above the mean); P: bytes of the gradient; W: bytes/s one process sends; L:
seconds per message of a ring; n: buckets; o: share of c that communication overlaps with. Rings are the pessimistic
choice for many processes: trees need fewer messages.
"""

import argparse
import csv
import math
import pathlib
from dataclasses import dataclass, replace

from table import RESULTS, markdown

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step needs, on one process."""

    compute_s: float
    """c."""
    gradient_bytes: float
    """P."""
    bandwidth: float
    """W, bytes/s."""
    latency_s: float
    """L."""
    buckets: int = 1
    """n."""
    overlap: float = 0.0
    """o."""
    jitter: float = 0.0
    """s."""


# The published ResNet-34 at 32x32 (docs/reproduction.md): 2.319 GFLOP per forward unit, 17.17 units per image, 33.36
# million parameters in float32; batch 128 per GPU. Assumed: 120 TFLOP/s, a quarter to a half of what the data sheets of
# such GPUs promise in bf16; W, L, n and s. The backward pass of training is 3.67 of the 17.17 units.
_FLOP = 2.319e9 * 17.17 * 128
GPU = Step(compute_s=_FLOP / 120e12, gradient_bytes=4 * 33.36e6, bandwidth=10 * _GIB, latency_s=10e-6, buckets=2,
           overlap=3.67 / 17.17, jitter=0.01)  # fmt: skip


def efficiency(step: Step, processes: int) -> float:
    """Throughput per process, as a share of that of one."""
    if processes == 1:
        return 1.0
    away = (processes - 1) / processes
    sending_s = 2 * away * step.gradient_bytes / step.bandwidth
    sending_s += 2 * (processes - 1) * step.latency_s * step.buckets
    slowest_s = step.compute_s * (1 + step.jitter * math.sqrt(2 * math.log(processes)))
    return step.compute_s / (slowest_s + max(0.0, sending_s - step.overlap * step.compute_s))


def predicted(row: dict[str, str]) -> float:
    """Efficiency of two processes by the share of time that a measured row spent communicating, waiting included."""
    share = float(row["communication"])
    return efficiency(Step(compute_s=1 - share, gradient_bytes=share, bandwidth=1.0, latency_s=0.0), 2)


def main() -> None:
    """Print the model and the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measured", type=pathlib.Path, default=RESULTS / "scaling.csv")
    args = parser.parse_args()
    networks = {
        "100 GiB/s per GPU": replace(GPU, bandwidth=100 * _GIB),
        "100 GiB/s, no overlap": replace(GPU, bandwidth=100 * _GIB, overlap=0.0),
        "10 GiB/s per GPU": GPU,
        "10 GiB/s, no overlap": replace(GPU, overlap=0.0),
        "1 GiB/s per GPU": replace(GPU, bandwidth=_GIB),
    }
    print(markdown([
        {"network": name, **{f"{n} GPUs": round(efficiency(step, n), 3) for n in (8, 64, 512)}}
        for name, step in networks.items()
    ]))  # fmt: skip
    with args.measured.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["arrangement"] in ("weak", "zero 2")]
    print(markdown([
        {"measured, 2 processes": row["arrangement"], "efficiency": float(row["ratio_median"]),
         "smallest": float(row["ratio_min"]), "largest": float(row["ratio_max"]), "model": round(predicted(row), 3)}
        for row in rows
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
