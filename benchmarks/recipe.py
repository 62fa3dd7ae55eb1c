"""Which parts of a recipe help: one row per change of the default recipe, beside the published one.

    python benchmarks/recipe.py [--rows default published no_ema] [--seeds 0 1 2] [--split val|test] [--docs]
    python benchmarks/recipe.py --rows default published default_longer --time-ratio 1.3 --seeds 0 1 2 --split test

A row is the default recipe (`--config`, by default launch/configs/cifar10_8k_wrn10_2.yaml) with some settings changed,
for the same number of images. Rows are screened on validation; `--split test` measures the same runs on test. Scores
are frontier scores in one frame for all rows and seeds: that of the dedicated networks of lambda 0 and 1 of the
published row, first seed. Differences are to the row of `--against`, in points, with the 95% interval of a paired
bootstrap over images (`paired.py`). `default_longer` is the default with the epochs that fit into the wall time of the
published recipe: `--time-ratio` is the default's images/s over its. A run that is there already is not trained again,
so the same command goes on. Writes benchmarks/results/recipe_<name of the configuration>_<split>.csv.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from paired import Right, difference, right_images
from table import RESULTS, describe, environment, markdown, put_into_docs, save
from trained import dedicated_points, images_per_s, trained

from oat_dist.config import Config
from oat_dist.config_io import load_config
from oat_dist.data import PreparedData
from oat_dist.dedicated import measure_run
from oat_dist.distributed import World
from oat_dist.engine import init_world
from oat_dist.errors import UserError, require
from oat_dist.evaluation import EvaluationAttack
from oat_dist.frontier import Frame, dedicated_frame, frontier_score, mean_points
from oat_dist.trainer import open_data

BASE = ("--config=launch/configs/cifar10_8k_wrn10_2.yaml", "--data.loader=memory")
"""Arguments of the default recipe."""

PUBLISHED = {
    "data.cutout_pixels": 0,
    "data.normalise": False,
    "model.activation": "relu",
    "model.init": "pytorch",
    "conditioning.distribution": "discrete",
    "conditioning.lambdas": [0.0, 0.1, 0.2, 0.3, 0.4, 1.0],
    "conditioning.weights": None,
    "conditioning.encoding": "orthogonal",
    "conditioning.encoding_width": 128,
    "conditioning.film": "mlp",
    "conditioning.film_start": "paper",
    "conditioning.norm": "dual",
    "attack.steps": None,
    "attack.early_steps": None,
    "attack.early_share": 0.0,
    "attack.step_size_255": None,
    "attack.random_start": None,
    "loss.robust": "pgd_at",
    "loss.label_smoothing": 0.0,
    "loss.self_distillation": 0.0,
    "loss.clean_at_one": True,
    "optim.optimizer": "sgd",
    "optim.lr": 0.1,
    "optim.lr_batch_size": None,
    "optim.film_lr": 1.0,
    "optim.muon_lr": 0.05,
    "optim.momentum": 0.9,
    "optim.nesterov": False,
    "optim.weight_decay": 5e-4,
    "optim.decay": "all",
    "optim.batch_size": 128,
    "optim.schedule": "cosine",
    "optim.warmup_share": 0.0,
    "optim.clip_norm": 0.0,
    "optim.ema_decay": 0.0,
}
"""The recipe of launch/configs/*_published.yaml, whatever the default has become; steps and random start left out are
PGD-AT's."""

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": PUBLISHED,
    "sgd": {"optim.optimizer": "sgd"},
    "muon_lr_0.1": {"optim.muon_lr": 0.1},
    "no_ema": {"optim.ema_decay": 0.0},
    "paper_start": {"conditioning.film": "mlp", "conditioning.film_start": "paper"},
    "equal_weights": {"conditioning.weights": None},
    # Four fifths of the images at the ends of the curve.
    "end_weights": {"conditioning.weights": [10.0, 1.0, 1.0, 1.0, 1.0, 6.0]},
    "mlp": {"conditioning.film": "mlp"},
    "cosine": {"optim.schedule": "cosine", "optim.warmup_share": 0.0},
    "no_nesterov": {"optim.nesterov": False},
    "lr_0.2": {"optim.lr": 0.2},
    "film_lr_10": {"optim.film_lr": 10.0},
    "film_lr_30": {"optim.film_lr": 30.0},
    # At the same rate, twice as high per image.
    "batch_64": {"optim.batch_size": 64},
    # The weights' average over as many images as that of batch_64.
    "batch_32": {"optim.batch_size": 32, "optim.ema_decay": 0.99},
    # The weights' average over as many images as that of the default.
    "mlp_batch_64": {"conditioning.film": "mlp", "optim.batch_size": 64, "optim.ema_decay": 0.99},
    "kaiming": {"model.init": "kaiming"},
    "awp": {"optim.awp_gamma": 5e-3, "optim.awp_warmup_share": 0.3},
    "no_shift": {"data.shift_pixels": 0},
    "silu": {"model.activation": "silu"},
    "decay_weights": {"optim.decay": "weights"},
    "label_smoothing": {"loss.label_smoothing": 0.1},
    "self_distillation": {"loss.self_distillation": 0.5},
    "cutout": {"data.cutout_pixels": 8},
    "normalise": {"data.normalise": True},
    "no_clean_at_one": {"loss.clean_at_one": False},
    "shared_statistics": {"conditioning.norm": "shared_statistics"},
    # As many images at lambda = 0 as the default has.
    "uniform": {
        "conditioning.distribution": "uniform",
        "conditioning.zero_share": 0.4,
        "conditioning.knots": [0.0, 0.1, 0.2, 0.4, 1.0],
    },
    "trades": {"loss.robust": "trades"},
    "n_fgsm": {"loss.robust": "n_fgsm"},
    "two_steps": {"attack.steps": 2},
    # The whole radius in one step: the second goes along the border of the ball.
    "two_long_steps": {"attack.steps": 2, "attack.step_size_255": 8.0},
    "early_steps": {"attack.early_steps": 2, "attack.early_share": 0.5},
}
"""Name -> settings on top of the default recipe."""

LONGER = "default_longer"
_LAMBDAS = (0.0, 0.2, 1.0)
_DIFFERENCES = (("sa", 0.0), ("ra", 1.0))


class Table:
    """Runs of one recipe and its variants, trained and measured where they are missing."""

    def __init__(self, argv: Sequence[str], seeds: Sequence[int], split: str, world: World) -> None:
        """Fix the frame.

        Args:
            argv: Arguments of `load_config`: the default recipe.
            seeds: Seeds of every row.
            split: Split that is measured.
            world: This process.
        """
        self.argv, self.seeds, self.split, self.world = list(argv), seeds, split, world
        self.base = load_config(self.argv)
        self.data: PreparedData = open_data(self.base)
        ends = dedicated_points(self.configs("ends", PUBLISHED)[0], (0.0, 1.0), self.data, world, split)
        self.frame: Frame = dedicated_frame(ends)

    def configs(self, row: str, settings: Mapping[str, Any]) -> list[Config]:
        """The runs of a row, one per seed."""
        # The measurement at a run's end is on validation: nothing is seen of test before --split test asks for it.
        own = {"name": f"{self.base.name}-{row}", "evaluation.split": "val"}
        return [load_config(self.argv, {**own, "seed": seed, **settings}) for seed in self.seeds]

    def row(self, row: str, settings: Mapping[str, Any]) -> tuple[dict[str, object], list[Right]]:
        """Train and measure what a row stands for, or read what was measured; and which images it got right."""
        configs = self.configs(row, settings)
        runs = [trained(config, self.data, self.world) for config in configs]
        lambdas, attack = self.base.evaluation.lambdas, EvaluationAttack.of(self.base)
        where = {"data": self.data, "split": self.split}
        curves = [measure_run(run, lambdas, attack, **where, world=self.world) for run in runs]
        scores = [frontier_score(curve, self.frame) for curve in curves]
        found: dict[str, object] = {"row": row, "epochs": configs[0].optim.epochs, "score": _mean(scores, 3)}
        found["score_std"] = round(statistics.stdev(scores), 3) if len(scores) > 1 else None
        for lam in _LAMBDAS:
            for key in ("sa", "ra"):
                found[f"{key}_{lam:g}"] = _mean([100 * p[key] for c in curves for p in c if p["lam"] == lam], 2)
        found["sa_rise"], found["ra_fall"] = wrong_way(curves)
        found["images_per_s"] = _mean([images_per_s(run) for run in runs], 1)
        print(found, file=sys.stderr, flush=True)
        return found, [right_images(run, lambdas, attack, **where) for run in runs]


def longer(base: Config, time_ratio: float | None) -> dict[str, int]:
    """Settings of the default recipe for the wall time of the published one.

    Args:
        base: The default recipe.
        time_ratio: Its images/s over those of the published one.

    Raises:
        UserError: There is no ratio, or none that gives another epoch.
    """
    epochs = int(base.optim.epochs * (time_ratio or 0))
    expected = f"must give {LONGER} more than optim.epochs={base.optim.epochs}"
    require(epochs > base.optim.epochs, "--time-ratio", time_ratio, expected)
    return {"optim.epochs": epochs}


def wrong_way(curves: Sequence[Sequence[dict]]) -> tuple[float, float]:
    """How far accuracies go the wrong way as lambda grows, seeds pooled: SA should not rise and RA not fall.

    Args:
        curves: Points of every seed, at the same lambdas.

    Returns:
        Largest rise of SA and largest fall of RA from any lambda to any larger one, in points; 0 where there is none.
    """
    pooled = sorted(mean_points(curves), key=lambda point: point["lam"])
    pairs = list(itertools.combinations(pooled, 2))
    sa_rise, ra_fall = (
        max(0.0, *(sign * (high[key] - low[key]) for low, high in pairs)) for key, sign in (("sa", 1), ("ra", -1))
    )
    return round(100 * sa_rise, 2), round(100 * ra_fall, 2)


def compared(row: Mapping[str, object], ours: Sequence[Right], theirs: Sequence[Right]) -> dict[str, object]:
    """A row with its differences to another, in points."""
    found = dict(row)
    for key, lam in _DIFFERENCES:
        values = difference(ours, theirs, (key, lam))
        names = (f"more_{key}_{lam:g}", f"more_{key}_{lam:g}_low", f"more_{key}_{lam:g}_high")
        found |= {name: round(100 * value, 2) for name, value in zip(names, values, strict=True)}
    return found


def report(rows: Sequence[Mapping[str, object]], against: str, conditions: Mapping[str, object]) -> str:
    """The table and its conditions.

    Args:
        rows: From `compared`.
        against: The row that differences are to.
        conditions: Where, with what, which seeds.
    """
    shown = []
    for row in rows:
        cells = {key: value for key, value in row.items() if not key.startswith("more_")}
        for key, lam in _DIFFERENCES:
            value, low, high = (row[f"more_{key}_{lam:g}{end}"] for end in ("", "_low", "_high"))
            text = "" if row["row"] == against else f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
            cells[f"{key}_{lam:g} - {against}"] = text
        shown.append(cells)
    return f"{markdown(shown)}\n\n{describe(conditions)}"


def main(argv: Sequence[str]) -> None:
    """Train what is missing, print, write."""
    names = (*ROWS, LONGER)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=names, default=list(ROWS), metavar="ROW", help=", ".join(names))
    parser.add_argument("--against", choices=list(ROWS), default="published", metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--time-ratio", type=float, help=f"images/s of the default over the published, for {LONGER}")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/reproduction.md")
    args, rest = parser.parse_known_args(argv)
    if not any(argument.startswith("--config") for argument in rest):
        rest = [*BASE, *rest]
    base = load_config(rest)
    settings = ROWS | ({LONGER: longer(base, args.time_ratio)} if LONGER in args.rows else {})
    with init_world(base.engine.threads) as world:
        table = Table(rest, args.seeds, args.split, world)
        found = {row: table.row(row, settings[row]) for row in dict.fromkeys((args.against, *args.rows))}
        conditions = {"split": args.split, "images": table.data.counts[args.split]}
        conditions |= {"seeds": " ".join(map(str, args.seeds)), "time_ratio": args.time_ratio}
        conditions |= environment(world.device)
    theirs = found[args.against][1]
    rows = [compared(*found[row], theirs) for row in args.rows]
    text = report(rows, args.against, conditions)
    print(text)
    save(
        [row | {"against": args.against} | conditions for row in rows], RESULTS / f"recipe_{base.name}_{args.split}.csv"
    )
    if args.docs:
        put_into_docs(f"recipe {base.name}" + (" validation" if args.split == "val" else ""), text)


def _mean(values: Sequence[float], digits: int) -> float | None:
    return round(statistics.mean(values), digits) if values else None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
