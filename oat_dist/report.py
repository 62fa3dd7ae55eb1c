"""The measured curve of one network: JSON, table, figure, and what became of every image.

{"model": ..., "dataset": ..., "split": ..., "num_examples": n, "attack": {...},
"points": [{"lam": 0.0, "sa": 0.99, "ra": 0.05, "sa_ci": [0.97, 1.0], "ra_ci": [0.02, 0.09], ...}, ...],
"confidence": {...}, "checks": [...], ...}                      accuracies are fractions in [0, 1]

`oat_dist.evaluation.summary` has all keys of a point, `oat_dist.evaluation.checks` those of a check. With "collapse"
(`oat_dist.guard.Collapse`) where the guard stepped in while the network was trained.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from oat_dist import plots
from oat_dist.config import Config
from oat_dist.data import PreparedData, evaluation_batches
from oat_dist.distributed import World
from oat_dist.evaluation import AttackList, EvaluationAttack, Plan, run_plan
from oat_dist.evaluation.checks import self_checks
from oat_dist.evaluation.summary import summary, write_images
from oat_dist.evaluation.unit_log import forget_units
from oat_dist.guard import Collapse
from oat_dist.models.network import ConditionalNetwork
from oat_dist.robustbench import write_model_infos
from oat_dist.weights import whole_file


def measure(
    network: ConditionalNetwork,
    data: PreparedData,
    plan: Plan,
    *,
    config: Config,
    split: str,
    batch_size: int,
    world: World,
    stem: pathlib.Path,
    num_images: int | None = None,
    more: Mapping[str, object] | None = None,
    quiet: bool = False,
) -> dict:
    """Measure a network, write STEM.json with its figures, and print the table (on the main rank).

    The same call goes on after a kill: finished parts are kept beside the report until it is written.

    Args:
        network: The network, on the device of `world`, equal on all ranks.
        data: Data set to measure on.
        plan: Where on the curve, under which attacks.
        config: Configuration of the run; it names model and loader.
        split: Split of the data set.
        batch_size: Images per forward pass.
        world: The ranks that share the work.
        stem: Path without suffix; its folder exists.
        num_images: Images of the split, evenly spread; default: all.
        more: Further keys of the report.
        quiet: Print nothing.

    Returns:
        The report, in the form of frontier.json.

    Raises:
        UserError: It cannot be written; found before anything is computed.
    """
    batches = evaluation_batches(data, split, config.data, batch_size, device=world.device, num_images=num_images)
    about = [data.name, split, dict(data.sha256)]
    outcome = run_plan(network, batches, plan, world=world, folder=stem.parent, about=about)
    checks = self_checks(network, batches, outcome, world=world)
    found = summary(outcome)
    report = describe(config, data, split, plan.attack, found.pop("points"))
    report |= {"num_examples": len(outcome.index_M), **found, "checks": checks, **(more or {})}
    if world.is_main:
        write_images(outcome, stem.with_name(stem.name + ".images.safetensors"))
        paths = write_report(report, stem)
        forget_units(stem.parent, outcome.fingerprint)
        if not quiet:
            print_report(report, paths)
    return report


def describe(
    config: Config,
    data: PreparedData,
    split: str,
    attack: EvaluationAttack | AttackList,
    points: Sequence[dict],
) -> dict:
    """Points with what they were measured on, in the form of frontier.json."""
    return {
        "model": config.model.name,
        "dataset": data.name,
        "split": split,
        "num_examples": data.counts[split],
        "attack": attack.to_dict(),
        "points": list(points),
    }


def write_report(report: dict, stem: pathlib.Path) -> list[pathlib.Path]:
    """Write STEM.json, STEM.png and STEM.svg, and RobustBench's files where it applies; returns the paths.

    Args:
        report: In the form of frontier.json.
        stem: Path without suffix; its folder exists.
    """
    paths = [stem.with_name(stem.name + suffix) for suffix in (".json", ".png", ".svg")]
    for path in paths[1:]:
        with whole_file(path) as temporary:
            plots.draw_frontier(report, temporary)
    paths += write_model_infos(report, stem)
    # Last, because a report that is there is complete.
    with whole_file(paths[0]) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    return paths


def print_report(report: dict, paths: Sequence[pathlib.Path], console: Console | None = None) -> None:
    """Print the table lambda / SA / RA with 95% intervals, flagged checks, where the files are, a collapse in training.

    Args:
        report: In the form of frontier.json.
        paths: The files.
        console: Where to; default: standard output.
    """
    console = console or Console()
    attack = report["attack"]
    table = Table(title=f"{report['model']} on {report['dataset']} {report['split']}, n = {report['num_examples']}")
    table.add_column("lambda", justify="right")
    table.add_column("SA %", justify="right")
    table.add_column(f"RA % ({attack['name']}, {attack['norm']}, eps {attack['eps'] * 255:g}/255)", justify="right")
    has_worst = any("ra_worst" in point for point in report["points"])
    if has_worst:
        table.add_column("RA % worst lambda", justify="right")
    for point in report["points"]:
        keys = ("sa", "ra", *(("ra_worst",) if has_worst else ()))
        table.add_row(f"{point['lam']:g}", *(accuracy_text(point, key) for key in keys))
    if "random_lambda" in report:
        drawn = report["random_lambda"]
        table.add_row("random", accuracy_text(drawn, "sa"), accuracy_text(drawn, "ra"), *[""] * has_worst)
    console.print(table)
    for check in report.get("checks", []):
        if check["flagged"]:
            where = f" at lambda {', '.join(f'{lam:g}' for lam in check['lambdas'])}" if check["lambdas"] else ""
            console.print(f"flagged: {check['check']}{where}: {check['worst']:.3g} {check['detail']}", soft_wrap=True)
    for path in paths:
        print(path)
    if "collapse" in report:
        console.print(Collapse(**report["collapse"]).sentence, soft_wrap=True)


def accuracy_text(point: dict, key: str) -> str:
    """Percent, with the interval where there is one, as tables have it."""
    interval = point.get(f"{key}_ci")
    return f"{100 * point[key]:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
