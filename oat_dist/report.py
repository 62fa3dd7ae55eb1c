"""The measured curve of one network: JSON, table, figure, and what became of every image.

{"model": ..., "dataset": ..., "split": ..., "num_examples": n, "attack": {...},
"points": [{"lam": 0.0, "sa": 0.99, "ra": 0.05, "sa_ci": [0.97, 1.0], "ra_ci": [0.02, 0.09], ...}, ...],
"confidence": {...}, "checks": [...], ...}                      accuracies are fractions in [0, 1]

Of a network of several widths every point has its "width", and "widths" holds {"width", "parameters", "forward_flops"}
of the network that each makes, cut out. Of a network with weight noise "stochastic" is true and "noise_draws" says over
how many draws the mean was taken. `oat_dist.evaluation.summary` has all other keys of a point,
`oat_dist.evaluation.checks` those of a check. With "collapse" (`oat_dist.guard.Collapse`) where the guard stepped in
while the network was trained.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from oat_dist import plots
from oat_dist.config import Config
from oat_dist.cost import width_costs
from oat_dist.data import Batch, PreparedData, evaluation_batches
from oat_dist.distributed import World
from oat_dist.evaluation import AttackList, EvaluationAttack, Outcome, Plan, run_plan
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
    widths: Sequence[float] | None = None,
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
        widths: Widths of the network, in the order of the report; default: all, the largest first.
        num_images: Images of the split, evenly spread; default: all.
        more: Further keys of the report.
        quiet: Print nothing.

    Returns:
        The report, in the form of frontier.json.

    Raises:
        UserError: It cannot be written; found before anything is computed.
    """
    widths = tuple(reversed(network.slimming.widths)) if widths is None else widths
    batches = evaluation_batches(data, split, config.data, batch_size, device=world.device, num_images=num_images)
    about = [data.name, split, dict(data.sha256)]
    outcomes = [
        run_plan(network, batches, replace(plan, width=width), world=world, folder=stem.parent, about=about)
        for width in widths
    ]
    report = describe(config, data, split, plan.attack, [])
    report |= {"num_examples": len(outcomes[0].index_M), "precision": plan.precision, "seed": plan.seed}
    report |= _together(network, data, [_found(network, batches, outcome, world) for outcome in outcomes], widths)
    report |= more or {}
    if world.is_main:
        for outcome in outcomes:
            of_width = f".width_{outcome.plan.width:g}" if outcome.plan.width != 1 else ""
            write_images(outcome, stem.with_name(f"{stem.name}{of_width}.images.safetensors"))
        paths = write_report(report, stem)
        for outcome in outcomes:
            forget_units(stem.parent, outcome.fingerprint)
        if not quiet:
            print_report(report, paths)
    return report


def _found(network: ConditionalNetwork, batches: Sequence[Batch], outcome: Outcome, world: World) -> dict:
    """What one width's outcome adds to a report."""
    return {**summary(outcome), "checks": self_checks(network, batches, outcome, world=world)}


def _together(
    network: ConditionalNetwork, data: PreparedData, found: Sequence[dict], widths: Sequence[float]
) -> dict[str, object]:
    """What the widths of a network add to a report: points and checks side by side, the rest with what each costs."""
    if len(network.slimming.widths) == 1:
        return found[0]
    height, width_px, channels = data.image_shape
    costs = {cost["width"]: cost for cost in width_costs(network, (channels, height, width_px))}
    report = {"points": [], "confidence": found[0]["confidence"], "checks": [], "widths": []}
    for width, of_width in zip(widths, found, strict=True):
        for key in ("points", "checks"):
            report[key] += [{"width": width, **entry} for entry in of_width[key]]
        own = {key: value for key, value in of_width.items() if key not in report}
        report["widths"].append(costs[width] | own)
    return report


def describe(
    config: Config,
    data: PreparedData,
    split: str,
    attack: EvaluationAttack | AttackList,
    points: Sequence[dict],
) -> dict:
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

    Of several widths also what each costs.

    Args:
        report: In the form of frontier.json.
        paths: The files.
        console: Where to; default: standard output.
    """
    console = console or Console()
    attack = report["attack"]
    table = Table(title=f"{report['model']} on {report['dataset']} {report['split']}, n = {report['num_examples']}")
    costs = {cost["width"]: cost for cost in report.get("widths", ())}
    for name in ("width", "parameters", "MFLOPs") if costs else ():
        table.add_column(name, justify="right")
    table.add_column("lambda", justify="right")
    table.add_column("SA %", justify="right")
    table.add_column(f"RA % ({attack['name']}, {attack['norm']}, eps {attack['eps'] * 255:g}/255)", justify="right")
    has_worst = any("ra_worst" in point for point in report["points"])
    if has_worst:
        table.add_column("RA % worst lambda", justify="right")
    for point in report["points"]:
        cost = costs.pop(point.get("width"), None)  # in the first row of its width
        numbers = (f"{cost['parameters']:,}", f"{cost['forward_flops'] / 1e6:.2f}") if cost else ("", "")
        told = (f"{point['width']:g}", *numbers) if "width" in point else ()
        keys = ("sa", "ra", *(("ra_worst",) if has_worst else ()))
        table.add_row(*told, f"{point['lam']:g}", *(accuracy_text(point, key) for key in keys))
    for found in (report, *report.get("widths", ())):
        if "random_lambda" in found:
            told = (f"{found['width']:g}", "", "") if "width" in found else ("",) * 3 if "widths" in report else ()
            drawn = found["random_lambda"]
            table.add_row(*told, "random", accuracy_text(drawn, "sa"), accuracy_text(drawn, "ra"), *[""] * has_worst)
    console.print(table)
    for found in (report, *report.get("widths", ())):
        if "matrix" in found:
            console.print(_matrix_table(found["matrix"], f", width {found['width']:g}" if "width" in found else ""))
    for check in report.get("checks", []):
        if check["flagged"]:
            where = f" at width {check['width']:g}" if "width" in check else ""
            where += f" at lambda {', '.join(f'{lam:g}' for lam in check['lambdas'])}" if check["lambdas"] else ""
            console.print(f"flagged: {check['check']}{where}: {check['worst']:.3g} {check['detail']}", soft_wrap=True)
    for path in paths:
        print(path)
    if "collapse" in report:
        console.print(Collapse(**report["collapse"]).sentence, soft_wrap=True)


def _matrix_table(matrix: dict, of_width: str) -> Table:
    """RA of every lambda that answers, attacked through every lambda the attacker may choose."""
    title = f"RA % by the lambda that answers (across) and the lambda that is attacked through (down){of_width}"
    table = Table(title=title)
    for name in ("", *(f"{lam:g}" for lam in matrix["lambdas"])):
        table.add_column(name, justify="right")
    for at, via in enumerate(matrix["attack_lambdas"]):
        cells = zip(matrix["ra"][at], matrix["ra_ci"][at], strict=True)
        table.add_row(f"{via:g}", *(accuracy_text({"ra": ra, "ra_ci": interval}, "ra") for ra, interval in cells))
    return table


def accuracy_text(point: dict, key: str) -> str:
    """Percent, with the interval where there is one, as tables have it."""
    interval = point.get(f"{key}_ci")
    return f"{100 * point[key]:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
