"""Dedicated networks: one unconditioned network per lambda, the frontier that a conditional network is held against.

Each is trained by PGD-AT with a fixed lambda, (1 - lambda) CE(clean) + lambda CE(adversarial), with the recipe, data
and budget of the conditional run (Wang et al., "Once-for-All Adversarial Training", NeurIPS 2020, section 4.2). They
are ordinary runs, found again by their fingerprint, so none is trained twice.

A frontier file is {"model", "dataset", "data_sha256", "split", "num_examples", "attack", "recipe", "points",
"networks"}: "points" are means over seeds by lambda, "networks" holds {"lam", "seed", "sa", "ra", "run"} of each.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from oat_dist import report
from oat_dist.config import ConditioningConfig, Config, EvaluationConfig, computed_settings, fingerprint, of_one_width
from oat_dist.data import PreparedData, open_extra
from oat_dist.distributed import World
from oat_dist.errors import UserError
from oat_dist.evaluation import AttackList, EvaluationAttack, Plan
from oat_dist.frontier import mean_points, of_width
from oat_dist.resume import is_finished, other_data, train_checksum
from oat_dist.runs import free_stem, load_run


def dedicated_config(config: Config, lam: float, seed: int) -> Config:
    """The run of one dedicated network.

    Args:
        config: The conditional run whose recipe, data and budget it takes over.
        lam: Its lambda in [0, 1].
        seed: Its seed.

    Returns:
        A configuration whose fingerprint depends neither on the conditioning, nor on the widths below 1, nor on the
        measurements of `config`: the last weights count, and a measurement of its own on validation ends the run.
    """
    alone = of_one_width(config)
    return dataclasses.replace(
        alone,
        name=f"{config.name}-dedicated-{lam:g}",
        seed=seed,
        conditioning=ConditioningConfig(lambdas=(lam,), film="none", norm="single"),
        # There is no other lambda that could teach.
        loss=dataclasses.replace(alone.loss, self_distillation=0.0),
        evaluation=EvaluationConfig(lambdas=(lam,), split="val"),
        checkpoint=dataclasses.replace(config.checkpoint, resume="auto"),
    )


def find_trained(config: Config, data: PreparedData) -> pathlib.Path | None:
    """The finished run of a configuration on exactly this data, whatever its name, in `output_dir`; else None."""
    extra = open_extra(data, config.data)
    for run in sorted(pathlib.Path(config.output_dir).glob(f"*_{fingerprint(config)}*")):
        is_whole = is_finished(run) and (run / "model.safetensors").is_file()
        if is_whole and other_data(run, data, extra) is None:
            return run
    return None


def measure_run(
    run: pathlib.Path,
    lambdas: Sequence[float],
    attack: EvaluationAttack,
    *,
    data: PreparedData,
    split: str,
    world: World,
    width: float = 1.0,
) -> list[dict]:
    """Points of the network of a finished run; every rank must call. What was measured before is read.

    Args:
        run: Folder of the run.
        lambdas: Where on the curve.
        attack: The attack.
        data: Data set to measure on.
        split: Split of it.
        world: The ranks that share the images.
        width: Share of the channels.

    Returns:
        One point per lambda, with its confidence intervals.
    """
    config, network = load_run(run)
    points = world.on_main(lambda: measured_before(run, lambdas, attack, data, split, width=width))
    if points is not None:
        return points
    name = f"{split}_{attack.name}_{attack.norm}_eps{attack.eps * 255:g}"
    measured = report.measure(
        network.to(world.device),
        data,
        Plan(lambdas=tuple(lambdas), attack=attack, seed=config.seed),
        config=config,
        split=split,
        batch_size=config.evaluation.batch_size,
        world=world,
        stem=world.on_main(lambda: free_stem(run / "eval", name)),
        widths=(width,),
        quiet=True,
    )
    return measured["points"]


def frontier_file(
    config: Config, networks: Sequence[dict], *, data: PreparedData, split: str, attack: EvaluationAttack
) -> dict:
    """The content of a frontier file.

    Args:
        config: The conditional run whose recipe the networks share.
        networks: {"lam", "seed", "sa", "ra", "run"} of each, the same seeds at every lambda.
        data: The data set.
        split: Split that was measured.
        attack: The attack.
    """
    seeds = sorted({network["seed"] for network in networks})
    curves = [sorted((n for n in networks if n["seed"] == seed), key=lambda network: network["lam"]) for seed in seeds]
    return {
        **report.describe(config, data, split, attack, mean_points(curves)),
        "data_sha256": train_checksum(data),
        "recipe": recipe(config),
        "networks": list(networks),
    }


def read_frontier(path: pathlib.Path, config: Config, data: PreparedData, *, split: str) -> dict:
    """Read a frontier file that fits a conditional run: same data, split, recipe and attack.

    Args:
        path: The file.
        config: The conditional run.
        data: Its data set.
        split: Split that must have been measured.

    Raises:
        UserError: It cannot be read, or compares unlike with unlike.
    """
    try:
        found = json.loads(path.read_text())
        theirs = {"dataset": found["dataset"], "split": found["split"], "attack": found["attack"]}
        theirs |= {"training data": found["data_sha256"], **found["recipe"]}
        points = found["points"]
    except OSError as error:
        raise UserError(f"--frontier {path}: {error.strerror or error}; name a file of launch/frontier.py") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--frontier {path}: not a frontier file; name a file of launch/frontier.py") from None
    attack = EvaluationAttack.of(config).to_dict()
    ours = {"dataset": data.name, "split": split, "attack": attack, "training data": train_checksum(data)}
    for key, value in {**ours, **recipe(config)}.items():
        if theirs.get(key) != value:
            raise UserError(
                f"--frontier {path}: of another {key}: {_brief(theirs.get(key))} there, {_brief(value)} here"
            )
    lambdas = [point["lam"] for point in points]
    missing = [lam for lam in lambdas if lam not in config.evaluation.lambdas]
    if missing:
        expected = f"must include the lambdas of {path}: {', '.join(f'{lam:g}' for lam in lambdas)}"
        raise UserError(f"evaluation.lambdas={config.evaluation.lambdas}: {expected}")
    return found


def recipe(config: Config) -> dict[str, object]:
    """Dotted key -> value of what dedicated and conditional networks share."""
    own = ("conditioning.", "evaluation.", "seed")
    settings = computed_settings(of_one_width(config))
    return {key: value for key, value in settings.items() if not key.startswith(own)}


def require_same_recipe(run: pathlib.Path, config: Config) -> None:
    """Check that a conditional run shares recipe, data set and budget with dedicated networks.

    Args:
        run: Folder of the conditional run.
        config: Configuration that the dedicated networks are made from.

    Raises:
        UserError: It is no finished run, or a setting differs.
    """
    theirs, ours = recipe(load_run(run)[0]), recipe(config)
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(f"--run {run}: trained with {key}={theirs[key]!r}, the dedicated networks with {value!r}")


def measured_before(
    run: pathlib.Path,
    lambdas: Sequence[float],
    attack: EvaluationAttack | AttackList,
    data: PreparedData,
    split: str,
    num_images: int | None = None,
    width: float = 1.0,
) -> list[dict] | None:
    """Points of a run from its reports, or None where none was measured so; arguments as in `find_report`."""
    path = find_report(run, lambdas, attack, data, split, num_images, width)
    if path is None:
        return None
    points = {point["lam"]: point for point in of_width(json.loads(path.read_text())["points"], width)}
    return [points[lam] for lam in lambdas]


def find_report(
    run: pathlib.Path,
    lambdas: Sequence[float],
    attack: EvaluationAttack | AttackList,
    data: PreparedData,
    split: str,
    num_images: int | None = None,
    width: float = 1.0,
) -> pathlib.Path | None:
    """The report of a run with given points, or None where none was measured so.

    Args:
        run: Folder of a finished run, or of an exported width.
        lambdas: Where on the curve.
        attack: The attack.
        data: The data set.
        split: Split of it.
        num_images: Images of the split that were measured; default: all.
        width: Share of the channels.
    """
    wanted = {"dataset": data.name, "split": split, "attack": attack.to_dict()}
    wanted["num_examples"] = data.counts[split] if num_images is None else min(num_images, data.counts[split])
    # An exported width has no measurement of its own.
    for path in (*run.glob("frontier.json"), *sorted(run.glob("eval/*.json"))):
        found = json.loads(path.read_text())
        measured = {point["lam"] for point in of_width(found["points"], width)}
        if wanted.items() <= found.items() and set(lambdas) <= measured:
            return path
    return None


def _brief(value: object) -> str:
    """A setting for a one-line message; of a checksum the first digits."""
    text = str(value)
    return text if len(text) < 100 and len(text) != 64 else f"{text[:12]}..."
