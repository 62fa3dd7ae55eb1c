"""What a search leaves in its folder: search.csv, best.yaml, importance.csv, ablation.csv, search.png, and tables."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from oat_dist import plots
from oat_dist.comparison import compare
from oat_dist.config import Config
from oat_dist.config_io import with_settings, write_config
from oat_dist.frontier import mean_points
from oat_dist.weights import whole_file
from tune import tpe
from tune.cluster import Outcome
from tune.space import Space, settings


def best_outcome(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The trial with the highest validation frontier ratio among those trained to the end; None without any."""
    finished = [o for o in outcomes if o.status == "finished"]
    return max(finished, key=lambda o: o.metrics["ratio"], default=None)


def best_config(base: Config, outcome: Outcome, evaluation: Any) -> Config:
    """The configuration that best.yaml holds: ready for launch/train.py, which measures on test.

    Args:
        base: The run that trials started from.
        outcome: The chosen trial.
        evaluation: How the user wants runs measured.
    """
    config = with_settings(base, settings(outcome.job["sample"]))
    evaluation = dataclasses.replace(evaluation, lambdas=base.evaluation.lambdas, split="test", interval_epochs=0)
    return dataclasses.replace(
        config, evaluation=evaluation, name=f"{base.name}-best", engine=dataclasses.replace(config.engine, threads=0)
    )


def write_results(
    folder: pathlib.Path, outcomes: Sequence[Outcome], *, base: Config, evaluation: Any, space: Space, dedicated: dict,
    table_by: Sequence[str],
) -> list[pathlib.Path]:  # fmt: skip
    """Write everything that can be said of the trials so far; returns the paths.

    Args:
        folder: Of the search.
        outcomes: Of all trials, finished or not.
        base: The run that trials started from.
        evaluation: How the user wants runs measured.
        space: The space.
        dedicated: Content of the frontier file, on validation.
        table_by: Keys by which trials are averaged.
    """
    paths = [folder / "search.csv"]
    _write_rows(paths[0], [_row(outcome, space) for outcome in outcomes])
    best = best_outcome(outcomes)
    if best is not None:
        paths.append(folder / "best.yaml")
        with whole_file(paths[-1]) as temporary:
            write_config(best_config(base, best, evaluation), temporary)
    shares = trial_importance(space, outcomes)
    if shares:
        paths.append(folder / "importance.csv")
        _write_rows(paths[-1], [{"key": key, "importance": share} for key, share in shares.items()])
    if table_by:
        paths.append(folder / "ablation.csv")
        _write_rows(paths[-1], ablation_rows(outcomes, table_by))
    measured = [o for o in outcomes if o.metrics]
    at = measured.index(best) if best is not None else None
    for suffix in (".png", ".svg"):
        paths.append(folder / f"search{suffix}")
        with whole_file(paths[-1]) as temporary:
            curves = [o.metrics["points"] for o in measured]
            plots.draw_search(curves, at, compare(dedicated["points"]), dedicated, temporary)
    return paths


def trial_importance(space: Space, outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Importance of each key for the ratio at the first report, where every trial, stopped early or not, is alike."""
    reported = [o for o in outcomes if o.history]
    first = min((o.history[0][0] for o in reported), default=0)
    reported = [o for o in reported if o.history[0][0] == first]
    return tpe.importance(space, [o.job["sample"] for o in reported], [o.history[0][1] for o in reported])


def ablation_rows(outcomes: Sequence[Outcome], keys: Sequence[str]) -> list[dict]:
    """Means, deviations and intervals (as `mean_points` has them) of the finished trials that agree in some keys.

    Args:
        outcomes: Of all trials.
        keys: The keys; what else varies (seeds) is averaged over.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == "finished":
            groups.setdefault(json.dumps([outcome.job["sample"][key] for key in keys]), []).append(outcome)
    rows = []
    for values, members in groups.items():
        row = dict(zip(keys, json.loads(values), strict=True)) | {"trials": len(members)}
        columns = {"ratio": [m.metrics["ratio"] for m in members]}
        for at, point in enumerate(members[0].metrics["points"]):
            for key in ("sa", "ra"):
                columns[f"{key}/{point['lam']:g}"] = [m.metrics["points"][at][key] for m in members]
        for name, numbers in columns.items():
            row[name] = float(np.mean(numbers))
            row[f"{name}_std"] = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
        for point in mean_points([m.metrics["points"] for m in members]):
            for key in ("sa", "ra"):
                low, high = point.get(f"{key}_ci") or (None, None)
                row |= {f"{key}/{point['lam']:g}_low": low, f"{key}/{point['lam']:g}_high": high}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["ratio"])


def print_ablation(rows: Sequence[dict], keys: Sequence[str], title: str) -> None:
    """Print rows of `ablation_rows`: ratio, and SA and RA of the ends, in percent."""
    table = Table(title=title)
    for name in (*(key.rpartition(".")[2] for key in keys), "trials", "ratio", "SA(0)", "RA(0)", "SA(1)", "RA(1)"):
        table.add_column(name)
    for row in rows:
        cells = [str(row[key]) for key in keys] + [str(row["trials"])]
        for name, scale, digits in (("ratio", 1, 3), *((n, 100, 1) for n in ("sa/0", "ra/0", "sa/1", "ra/1"))):
            spread = "" if row[f"{name}_std"] is None else f" +- {scale * row[f'{name}_std']:.{digits}f}"
            low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
            interval = "" if low is None else f" [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
            cells.append(f"{scale * row[name]:.{digits}f}{spread}{interval}")
        table.add_row(*cells)
    Console().print(table)


def print_importance(shares: Mapping[str, float]) -> None:
    """Print the importance of each key."""
    if shares:
        text = ", ".join(f"{key} {share:.0%}" for key, share in shares.items())
        Console().print(f"importance for the first validation score (fANOVA): {text}")


def _row(outcome: Outcome, space: Space) -> dict:
    """One line of search.csv: sample, status, every metric."""
    sample, metrics = outcome.job["sample"], outcome.metrics
    row = {"trial": outcome.trial, "status": outcome.status}
    row |= {key: sample[key] for key in (*space.choices, *space.ranges)}
    row |= {key: metrics.get(key) for key in ("epoch", "ratio", "sa_mean", "ra_mean")}
    for point in metrics.get("points", []):
        row |= {f"{key}/{point['lam']:g}": point[key] for key in ("sa", "ra")}
    row |= {key: metrics.get(key) for key in ("seconds", "images_per_s", "run")}
    return row | {"history": " ".join(f"{e}:{r:.4f}" for e, r in outcome.history), "error": outcome.error}


def _write_rows(path: pathlib.Path, rows: Sequence[dict]) -> None:
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    with whole_file(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
