"""Conditional networks held against the dedicated frontier: the numbers, the table, CSV and figure.

A comparison is {"frame", "dedicated": {"points", "score"}, "conditional": {"points", "curve", "score", "ratio",
"ratio_std", "ratios", "gaps", "monotonicity", "area_between"} or None, "controls": {name: {"points", "score",
"ratio"}}, "best_constant": {"lam", "score", "ratio"}}. Scores and ratios of a conditional network are means over its
seeds.
"""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from oat_dist import plots
from oat_dist.frontier import (
    area_between,
    at_lambdas,
    best_constant,
    controls,
    dedicated_frame,
    frontier_score,
    gaps,
    mean_points,
    monotonicity,
)
from oat_dist.weights import whole_file


def compare(dedicated: Sequence[dict], curves: Sequence[Sequence[dict]] = ()) -> dict:
    """Everything there is to say about conditional networks beside the dedicated ones.

    Args:
        dedicated: Mean points of the dedicated networks, the two ends among them.
        curves: Points of each conditional network (one per seed), at the dedicated lambdas and perhaps others.

    Returns:
        A comparison as described above.

    Raises:
        UserError: The dedicated networks make no frame, or a lambda is missing.
    """
    frame = dedicated_frame(dedicated)
    full = frontier_score(dedicated, frame)
    constant = {
        name: {"points": points, "score": (value := frontier_score(points, frame)), "ratio": value / full}
        for name, points in controls(dedicated).items()
    }
    lam, score = best_constant(dedicated)
    comparison = {
        "frame": dataclasses.asdict(frame),
        "dedicated": {"points": list(dedicated), "score": full},
        "conditional": None,
        "controls": constant,
        "best_constant": {"lam": lam, "score": score, "ratio": score / full},
    }
    if curves:
        scores = [frontier_score(at_lambdas(curve, dedicated), frame) for curve in curves]
        curve = mean_points(curves)
        points = at_lambdas(curve, dedicated)
        ratios = [score / full for score in scores]
        comparison["conditional"] = {
            "points": points,
            "curve": curve,
            "score": float(np.mean(scores)),
            "ratio": float(np.mean(ratios)),
            "ratio_std": float(np.std(ratios, ddof=1)) if len(ratios) > 1 else None,
            "ratios": ratios,
            "gaps": gaps(points, dedicated),
            "monotonicity": monotonicity(curve),
            "area_between": area_between(points, dedicated, frame),
        }
    return comparison


def write_comparison(comparison: dict, about: dict, stem: pathlib.Path) -> list[pathlib.Path]:
    """Write STEM.json, STEM.csv, STEM.png and STEM.svg; returns the paths.

    Args:
        comparison: From `compare`.
        about: "model", "dataset", "split", "num_examples" and "attack", as in frontier.json.
        stem: Path without suffix; its folder exists.
    """
    paths = [stem.with_name(stem.name + suffix) for suffix in (".json", ".csv", ".png", ".svg")]
    with whole_file(paths[0]) as temporary:
        temporary.write_text(json.dumps({**about, **comparison}, indent=1) + "\n")
    with whole_file(paths[1]) as temporary, temporary.open("w", newline="") as stream:
        rows = _rows(comparison)
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for path in paths[2:]:
        with whole_file(path) as temporary:
            plots.draw_comparison(comparison, about, temporary)
    return paths


def print_comparison(comparison: dict, about: dict, console: Console | None = None) -> None:
    """Print SA, RA and gaps per lambda, then scores and ratios with the controls below.

    Args:
        comparison: From `compare`.
        about: "model", "dataset", "split", "num_examples" and "attack".
        console: Where to; default: standard output.
    """
    console = console or Console()
    ours = comparison["conditional"]
    title = f"{about['model']} on {about['dataset']} {about['split']}, n = {about['num_examples']}, "
    table = Table(title=f"{title}{about['attack']['name']}, percent")
    names = ["lambda", "SA dedicated", "RA dedicated"]
    for name in [*names, *(["SA one network", "RA one network", "SA gap", "RA gap"] if ours else [])]:
        table.add_column(name, justify="right")
    for at, point in enumerate(comparison["dedicated"]["points"]):
        cells = [f"{point['lam']:g}", *_accuracies(point)]
        if ours:
            gap = ours["gaps"][at]
            cells += _accuracies(ours["points"][at])
            cells += [_cell(gap, f"{key}_gap", f"{key}_gap_se") for key in ("sa", "ra")]
        table.add_row(*cells)
    console.print(table)

    scores = Table(title="frontier score in the frame of the dedicated ends")
    for name in ("network", "score", "ratio"):
        scores.add_column(name, justify="left" if name == "network" else "right")
    if ours:
        spread = "" if ours["ratio_std"] is None else f" +- {ours['ratio_std']:.3f}"
        scores.add_row("one network", f"{ours['score']:.3f}", f"{ours['ratio']:.3f}{spread}")
    scores.add_row("dedicated networks", f"{comparison['dedicated']['score']:.3f}", "1")
    for name, control in comparison["controls"].items():
        scores.add_row(name, f"{control['score']:.3f}", f"{control['ratio']:.3f}")
    best = comparison["best_constant"]
    name = f"the best of them alone (lambda = {best['lam']:g}) at every lambda"
    scores.add_row(name, f"{best['score']:.3f}", f"{best['ratio']:.3f}")
    console.print(scores)
    if ours:
        shares = ours["monotonicity"]
        console.print(
            f"area between the fronts {ours['area_between']:.3f}; steps of lambda that go the right way: "
            f"SA {shares['sa']:.0%}, RA {shares['ra']:.0%}"
        )


def _rows(comparison: dict) -> list[dict]:
    """One row per network and lambda."""
    ours = comparison["conditional"]
    gap_of = {gap["lam"]: gap for gap in ours["gaps"]} if ours else {}
    curves = {"dedicated": comparison["dedicated"]["points"]}
    curves |= {"conditional": ours["curve"]} if ours else {}
    curves |= {name: control["points"] for name, control in comparison["controls"].items()}
    rows = []
    for network, points in curves.items():
        for point in points:
            row = {"network": network, "lambda": point["lam"]}
            row |= {key: point.get(key) for key in ("sa", "sa_std", "ra", "ra_std", "seeds")}
            for key in ("sa", "ra"):
                row[f"{key}_low"], row[f"{key}_high"] = point.get(f"{key}_ci") or (None, None)
            gap = gap_of.get(point["lam"], {}) if network == "conditional" else {}
            rows.append(row | {key: gap.get(key) for key in ("sa_gap", "sa_gap_se", "ra_gap", "ra_gap_se")})
    return rows


def _accuracies(point: dict) -> list[str]:
    return [_cell(point, key, f"{key}_std") for key in ("sa", "ra")]


def _cell(values: dict, key: str, error_key: str) -> str:
    """A value in percent, its error over seeds where there are several, its interval over images where it is known."""
    error, interval = values[error_key], values.get(f"{key}_ci")
    text = f"{100 * values[key]:.1f}" + ("" if error is None else f" +- {100 * error:.1f}")
    return text + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
