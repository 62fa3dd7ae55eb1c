"""Rows of a benchmark as a CSV file in benchmarks/results."""

import csv
import pathlib
from collections.abc import Mapping, Sequence

RESULTS = pathlib.Path(__file__).parent / "results"


def save(rows: Sequence[Mapping[str, object]], path: pathlib.Path) -> None:
    """Write rows of equal keys and print the path.

    Args:
        rows: At least one.
        path: Target; its folder is made if need be.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(path)
