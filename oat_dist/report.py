"""The measured curve of one network: JSON, table and figure.

{"model": ..., "dataset": ..., "split": ..., "num_examples": n, "attack": {...},
"points": [{"lam": 0.0, "sa": 0.99, "ra": 0.05}, ...]}          accuracies are fractions in [0, 1]

Of a network of several widths every point has its "width", and "widths" holds {"width", "parameters", "forward_flops"}
of the network that each makes, cut out. Of a network with weight noise "stochastic" is true and "noise_draws" says over
how many draws the mean was taken. With "collapse" (`oat_dist.guard.Collapse`) where the guard stepped in while the
network was trained.
"""

import json
import pathlib
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from oat_dist import plots
from oat_dist.config import Config
from oat_dist.cost import width_costs
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
    widths: Sequence[float] | None = None,
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
        widths: Widths of the network, in the order of the report; default: all, the largest first.
        collapse: What the guard found while the network was trained, for the report.

    Returns:
        The report, in the form of frontier.json.
    """
    there = network.slimming.widths
    widths = tuple(reversed(there)) if widths is None else widths
    batches = evaluation_batches(
        data, split, config.data, batch_size, rank=world.rank, ranks=world.ranks, device=world.device
    )
    curves = [
        evaluate(network, batches, lambdas, attack, seed=config.seed, world=world, width=width) for width in widths
    ]
    report = describe(config, data, split, attack, [point for points in curves for point in points])
    if len(there) > 1:
        height, width, channels = data.image_shape
        costs = {cost["width"]: cost for cost in width_costs(network, (channels, height, width))}
        report["widths"] = [costs[width] for width in widths]
    report |= {"collapse": asdict(collapse)} if collapse else {}
    if world.is_main:
        print_report(report, write_report(report, stem))
    return report


def describe(config: Config, data: PreparedData, split: str, attack: EvaluationAttack, points: Sequence[dict]) -> dict:
    """Points with what they were measured on, in the form of frontier.json."""
    is_stochastic = config.conditioning.kind == "float"
    return {
        "model": config.model.name,
        "dataset": data.name,
        "split": split,
        "num_examples": data.counts[split],
        "attack": attack.to_dict(),
        "points": list(points),
    } | ({"stochastic": True, "noise_draws": config.evaluation.num_noise_draws} if is_stochastic else {})


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
    """Print the table lambda / SA / RA, of several widths with their cost, where the files are, and a collapse."""
    attack = report["attack"]
    table = Table(title=f"{report['model']} on {report['dataset']} {report['split']}, n = {report['num_examples']}")
    costs = {cost["width"]: cost for cost in report.get("widths", ())}
    for name in ("width", "parameters", "MFLOPs") if costs else ():
        table.add_column(name, justify="right")
    table.add_column("lambda", justify="right")
    table.add_column("SA %", justify="right")
    table.add_column(f"RA % ({attack['name']}, {attack['norm']}, eps {attack['eps'] * 255:g}/255)", justify="right")
    for point in report["points"]:
        cost = costs.pop(point.get("width"), None)  # in the first row of its width
        numbers = (f"{cost['parameters']:,}", f"{cost['forward_flops'] / 1e6:.2f}") if cost else ("", "")
        told = (f"{point['width']:g}", *numbers) if "width" in point else ()
        table.add_row(*told, f"{point['lam']:g}", f"{100 * point['sa']:.1f}", f"{100 * point['ra']:.1f}")
    Console().print(table)
    for path in paths:
        print(path)
    if "collapse" in report:
        print(Collapse(**report["collapse"]).sentence)
