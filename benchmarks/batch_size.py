"""Does the cost of a step grow in proportion to the batch, and its memory too?

    python benchmarks/batch_size.py [--model wrn10_2] [--batch-sizes 32 64 ...] [--rounds 3] [--docs]

Takes whole steps of ours (`train_step.py --only ours`) at each batch size, each in a process of its own, so that peak
memory is that size's alone. Prints images per second, peak memory and the time per image relative to the median over
the sizes, and R^2 of the least-squares line through (images, seconds per step). Writes
benchmarks/results/batch_size_<model>.csv.
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Sequence

import torch
import train_step
from measuring import choose_precision
from table import RESULTS, describe, environment, markdown, put_into_docs, save

from oat_dist.distributed import default_device

BATCH_SIZES = (32, 64, 128, 256, 512, 1024)


def linear_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the least-squares line through at least two points."""
    slope, intercept = statistics.linear_regression(x, y)
    return slope, intercept, statistics.correlation(x, y) ** 2


def measure(args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per batch size."""
    rows = []
    for batch_size in args.batch_sizes:
        args.batch_size = batch_size
        result = train_step.alone("ours", args, rounds=args.rounds)
        seconds = statistics.median(result["seconds"])
        memory = {key: round(value, 1) for key, value in result.items() if key.endswith("mib")}
        rows.append(
            {
                "model": args.model,
                "precision": args.precision,
                "batch_size": batch_size,
                "images_per_s": round(batch_size / seconds, 2),
                "step_s": round(seconds, 4),
                "step_s_min": round(min(result["seconds"]), 4),
                "step_s_max": round(max(result["seconds"]), 4),
                **memory,
                "rounds": args.rounds,
            }
        )
        print(f"batch {batch_size}: {rows[-1]['images_per_s']} images/s", file=sys.stderr)
    per_image = [row["step_s"] / row["batch_size"] for row in rows]
    middle = statistics.median(per_image)
    return [
        row | {"s_per_image_over_median": round(value / middle, 3)} for row, value in zip(rows, per_image, strict=True)
    ]


def report(rows: Sequence[dict[str, object]], conditions: dict[str, object]) -> str:
    """The table, the line through it, and the conditions."""
    columns = {
        "batch_size": "batch",
        "images_per_s": "images/s",
        "step_s": "s per step",
        "peak_mib": "peak MiB",
        "s_per_image_over_median": "time per image / median",
    }
    lines = [markdown([{title: row[key] for key, title in columns.items()} for row in rows]), ""]
    if len(rows) > 2:
        slope, intercept, r_squared = linear_fit([row["batch_size"] for row in rows], [row["step_s"] for row in rows])
        lines.append(
            f"Least squares: {1000 * slope:.3f} ms per image + {1000 * intercept:.1f} ms, R^2 = {r_squared:.5f}.\n"
        )
    return "\n".join([*lines, describe({key: rows[0][key] for key in ("model", "precision", "rounds")} | conditions)])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=list(train_step.SHAPES), default="wrn10_2")
    add("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    add("--rounds", type=int, default=3, help="timed turns at each size, after the warm-up")
    add("--steps", type=int, default=1, help="steps of a turn")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    add("--device", type=torch.device, default=default_device())
    add("--docs", action="store_true", help="put the table into docs/reproduction.md")
    add("--out", type=pathlib.Path, help="CSV file; default: benchmarks/results/batch_size_<model>.csv")
    args = parser.parse_args()
    args.precision = choose_precision(args.precision, args.device)
    conditions = environment(args.device)
    rows = measure(args)
    text = report(rows, conditions)
    print(text)
    save([row | conditions for row in rows], args.out or RESULTS / f"batch_size_{args.model}.csv")
    if args.docs:
        put_into_docs(f"batch_size {args.model}", text)


if __name__ == "__main__":
    main()
