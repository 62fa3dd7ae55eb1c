"""The measured curve of one network: JSON, table and figure.

{"model": ..., "dataset": ..., "split": ..., "num_examples": n, "attack": {...},
"points": [{"lam": 0.0, "sa": 0.99, "ra": 0.05}, ...]}          accuracies are fractions in [0, 1]

With "collapse" (`oat_dist.guard.Collapse`) where the guard stepped in while the network was trained.
"""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from oat_dist import plots
from oat_dist.config import Config
from oat_dist.data import PreparedData, evaluation_batches
from oat_dist.distributed import World
from oat_dist.evaluation import EvaluationAttack, evaluate
from oat_dist.guard import Collapse
from oat_dist.models.network import ConditionalNetwork
from oat_dist.weights import whole_file


def measure(
    network: ConditionalNetwork,
    data: PreparedData,
    attack: EvaluationAttack,
    lambdas: Sequence[float],
    *,
    config: Config,
    split: str,
    batch_size: int,
    world: World,
    stem: pathlib.Path,
    collapse: Collapse | None = None,
) -> dict:
    """Measure a network, write STEM.json, STEM.png and STEM.svg, and print the table (on the main rank).

    Args:
        network: The network, on the device of `world`.
        data: Data set to measure on.
        attack: The attack.
        lambdas: Where on the curve.
        config: Configuration of the run; it names model, seed and loader.
        split: Split of the data set.
        batch_size: Images per forward pass and rank.
        world: The ranks that share the images.
        stem: Path without suffix; its folder exists.
        collapse: What the guard found while the network was trained, for the report.

    Returns:
        The report, in the form of frontier.json.
    """
    batches = evaluation_batches(
        data, split, config.data, batch_size, rank=world.rank, ranks=world.ranks, device=world.device
    )
    points = evaluate(network, batches, lambdas, attack, seed=config.seed, world=world)
    report = describe(config, data, split, attack, points) | ({"collapse": asdict(collapse)} if collapse else {})
    if world.is_main:
        print_report(report, write_report(report, stem))
    return report


def describe(config: Config, data: PreparedData, split: str, attack: EvaluationAttack, points: Sequence[dict]) -> dict:
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
    """Write STEM.json, STEM.png and STEM.svg; returns the paths.

    Args:
        report: In the form of frontier.json.
        stem: Path without suffix; its folder exists.
    """
    paths = [stem.with_name(stem.name + suffix) for suffix in (".json", ".png", ".svg")]
    with whole_file(paths[0]) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    for path in paths[1:]:
        with whole_file(path) as temporary:
            plots.draw_frontier(report, temporary)
    return paths


def print_report(report: dict, paths: Sequence[pathlib.Path]) -> None:
    """Print the table lambda / SA / RA, where the files are, and a collapse in training."""
    attack = report["attack"]
    table = Table(title=f"{report['model']} on {report['dataset']} {report['split']}, n = {report['num_examples']}")
    table.add_column("lambda", justify="right")
    table.add_column("SA %", justify="right")
    table.add_column(f"RA % ({attack['name']}, {attack['norm']}, eps {attack['eps'] * 255:g}/255)", justify="right")
    for point in report["points"]:
        table.add_row(f"{point['lam']:g}", f"{100 * point['sa']:.1f}", f"{100 * point['ra']:.1f}")
    Console().print(table)
    for path in paths:
        print(path)
    if "collapse" in report:
        print(Collapse(**report["collapse"]).sentence)
