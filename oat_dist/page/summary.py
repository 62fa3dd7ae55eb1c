"""What the page says of runs, as JSON values. Every number that is shown as text is rounded here, as in the tables.

A point is {"lam", "lam_text", "sa", "ra", "sa_ci", "ra_ci", "sa_text", "ra_text"} and perhaps the same of "ra_worst".
"""

import datetime
import json
import math
import pathlib
import shlex
from collections.abc import Sequence

import torch

from oat_dist.config import to_dict
from oat_dist.frontier import pareto_front
from oat_dist.guard import Collapse
from oat_dist.page.finished import FinishedRun, read_images
from oat_dist.page.gallery import BYTES, gallery
from oat_dist.page.per_class import per_class
from oat_dist.report import accuracy_text

_KEYS = ("sa", "ra", "ra_worst")
_PANELS = {
    "Loss": {"loss": "total", "loss_clean": "clean", "loss_robust": "robust"},
    "Accuracy on training batches": {"accuracy_clean": "clean", "accuracy_robust": "attacked"},
    "Validation": {"val_frontier_score": "frontier score", "guard_ra": "RA of the guard"},
    "Learning rate": {"lr": "learning rate"},
}
_MOST_NAMED = 6
"""Lambdas that a note names one by one."""
_MOST_STEPS = 400
"""Points of a training curve; of longer ones evenly spread steps are shown."""


def page_values(runs: Sequence[FinishedRun], *, device: torch.device, num_images: int) -> dict:
    """Everything on the page; this is where images are attacked.

    Args:
        runs: The runs, side by side in this order.
        device: Where to compute.
        num_images: Images of the gallery of each run, at most.

    Returns:
        {"made": when, "title", "runs": [...], "dedicated": [...], "differences": settings in which the runs differ}.
    """
    dedicated = {found["path"]: found for run in runs for found in run.frontiers}
    labels = _labels(runs)
    return {
        "made": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "title": ", ".join(labels) if len(runs) < 4 else f"{len(runs)} runs",
        "runs": [
            _run(run, label, device, num_images=num_images, num_bytes=BYTES // len(runs))
            for run, label in zip(runs, labels, strict=True)
        ],
        "dedicated": [_dedicated(found) for found in dedicated.values()],
        "differences": _differences(runs),
    }


def _run(run: FinishedRun, label: str, device: torch.device, *, num_images: int, num_bytes: int) -> dict:
    images = read_images(run)
    about = run.frontier
    return {
        "label": label,
        "folder": str(run.folder),
        "model": about["model"],
        "dataset": about["dataset"],
        "split": about["split"],
        "num_examples": about["num_examples"],
        "attack": _attack(about["attack"]),
        "classes": list(run.data.classes),
        "points": [_point(point) for point, _ in run.curve],
        "per_class": per_class(run, images, device),
        "gallery": gallery(run, images, device, num_images=num_images, num_bytes=num_bytes),
        "matrices": [_matrix(report) for report in run.reports.values() if "matrix" in report],
        "reports": [_report(path, report) for path, report in run.reports.items()],
        "notes": _notes(run),
        "ratio": _ratio(run),
        "training": _training(run.metrics),
        "provenance": _flat(run.provenance | {"command": _commands(run.provenance)}),
        "settings": _flat(to_dict(run.config)),
    }


def _labels(runs: Sequence[FinishedRun]) -> list[str]:
    """A name for every run, the shortest kind by which they differ."""
    kinds = (
        [run.config.name for run in runs],
        [f"{run.config.name}, seed {run.config.seed}" for run in runs],
        [run.folder.resolve().name for run in runs],
    )
    return next((names for names in kinds if len(set(names)) == len(runs)), [str(run.folder) for run in runs])


def _attack(attack: dict) -> str:
    return f"{attack['name']}, {attack['norm']}, eps {attack['eps'] * 255:g}/255"


def _point(point: dict) -> dict:
    kept = {name: point[name] for key in _KEYS for name in (key, f"{key}_ci") if name in point}
    texts = {f"{key}_text": accuracy_text(point, key) for key in _KEYS if key in point}
    return {"lam": point["lam"], "lam_text": f"{point['lam']:g}", **kept, **texts}


def _report(path: pathlib.Path, report: dict) -> dict:
    """Rows of the table of one measurement."""
    points = [_point(point) for point in report["points"]]
    about = {key: report[key] for key in ("dataset", "split", "num_examples")}
    if "random_lambda" in report:
        points.append(_point({"lam": math.nan, **report["random_lambda"]}) | {"lam": None, "lam_text": "random"})
    return {"file": path.name, "attack": _attack(report["attack"]), **about, "points": points}


def _matrix(report: dict) -> dict:
    matrix = report["matrix"]
    texts = [[accuracy_text({"ra": value}, "ra") for value in row] for row in matrix["ra"]]
    lambdas = {f"{key}_texts": [f"{lam:g}" for lam in matrix[key]] for key in ("lambdas", "attack_lambdas")}
    return {"title": _attack(report["attack"]), "num_examples": report["num_examples"], **matrix, **lambdas,
            "ra_texts": texts}  # fmt: skip


def _notes(run: FinishedRun) -> list[str]:
    """What must be known of the numbers: a collapse in training, checks that were flagged."""
    notes = [Collapse(**run.frontier["collapse"]).sentence] if "collapse" in run.frontier else []
    flagged: dict[tuple, list[tuple]] = {}
    for path, report in run.reports.items():
        for check in report.get("checks", []):
            if check["flagged"]:
                flagged.setdefault((check["check"], check["detail"]), []).append((check, path.name))
    for (name, detail), found in flagged.items():
        lambdas = sorted({lam for check, _ in found for lam in check["lambdas"]})
        where = f" at lambda {', '.join(f'{lam:g}' for lam in lambdas)}" if lambdas else ""
        if len(lambdas) > _MOST_NAMED:
            where = f" at {len(lambdas)} lambdas from {lambdas[0]:g} to {lambdas[-1]:g}"
        worst, files = max(check["worst"] for check, _ in found), ", ".join(file for _, file in found)
        notes.append(f"flagged: {name}{where}: {worst:.3g} {detail} ({files})")
    return notes


def _ratio(run: FinishedRun) -> str | None:
    """The frontier ratio, where launch/frontier.py compared this very run."""
    for found in run.frontiers:
        here = run.folder.resolve()
        for path, ratio in zip(found.get("runs", []), (found.get("conditional") or {}).get("ratios", []), strict=False):
            if pathlib.Path(path).resolve() == here:
                return f"{ratio:.3f}"
    return None


def _dedicated(found: dict) -> dict:
    points = found["points"]
    front = [{key: point[key] for key in ("sa", "ra")} for point in pareto_front(points)]
    seeds = len({network["seed"] for network in found["networks"]})
    return {"path": found["path"], "seeds": seeds, "points": [_point(point) for point in points], "front": front}


def _training(metrics: Sequence[dict]) -> list[dict]:
    """Panels of curves over steps; numbers that are not finite are left out, for JSON has none."""
    panels = []
    for title, names in _PANELS.items():
        series = []
        for key, name in names.items():
            found = [(line["step"], line[key]) for line in metrics if key in line and math.isfinite(line[key])]
            every = max(1, math.ceil(len(found) / _MOST_STEPS))
            if found:
                series.append({"name": name, "points": found[:-1:every] + found[-1:]})
        if series:
            panels.append({"title": title, "series": series})
    return panels


def _commands(provenance: dict) -> str:
    return shlex.join(map(str, provenance.get("command", [])))


def _flat(tree: dict, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and value, as text."""
    rows = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def _differences(runs: Sequence[FinishedRun]) -> list[dict]:
    """{"key", "values"} of every setting that is not the same in all runs."""
    flat = [dict(_flat(to_dict(run.config))) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [{"key": key, "values": [settings.get(key, "") for settings in flat]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]
