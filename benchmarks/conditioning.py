"""Ways of telling a network about lambda, on one recipe: frontier score, parameters and images per second in one table.

    python benchmarks/conditioning.py [--seeds 0 1 2] [--rows mlp,dual table,dual float,dual] [--split val]
    python benchmarks/conditioning.py --config launch/configs/cifar10_8k_wrn10_2.yaml [--docs] [--key=value ...]

A row is conditioning.film and conditioning.norm, or "float" (weight noise, lambda 0 or 1 in training, clean images with
lambda = 1 left out) and the norm. Its score is that of the curve at evaluation.lambdas on a split, in the frame of the
dedicated networks of both ends (`oat_dist.frontier`), first seed, same recipe; mean and deviation over seeds. "none,
single" knows nothing of lambda: what it scores is what one point scores. Rows are chosen on validation; --split test
measures the same runs on test. A run that is there already is not trained again, so the same command goes on. Writes
benchmarks/results/conditioning_<name of the configuration>_<split>.csv; rows in it that are not asked for stay, if they
were measured on the same recipe, seeds, images and machine class.
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from table import RESULTS, describe, environment, kept, markdown, put_into_docs, save
from trained import dedicated_points, images_per_s, num_parameters, trained

from oat_dist.config import Config, fingerprint
from oat_dist.config_io import load_config
from oat_dist.data import PreparedData
from oat_dist.dedicated import dedicated_config, measure_run
from oat_dist.distributed import World
from oat_dist.engine import init_world
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack
from oat_dist.frontier import Frame, dedicated_frame, frontier_score, monotonicity
from oat_dist.trainer import open_data

FILMS = ("mlp", "shared", "table", "none")
NORMS = ("dual", "single", "shared_statistics")
ROWS = (*(f"{film},{norm}" for film in FILMS for norm in NORMS), "float,dual", "float,single")


def settings_of(row: str) -> dict[str, Any]:
    """Settings that make a run of the table from the common configuration.

    Args:
        row: One of `ROWS`.
    """
    told, norm = row.split(",")
    if told != "float":
        return {"conditioning.film": told, "conditioning.norm": norm}
    binary = {"conditioning.lambdas": [0.0, 1.0], "conditioning.weights": None, "loss.clean_at_one": False}
    return binary | {"conditioning.kind": "float", "conditioning.film": "none", "conditioning.norm": norm}


class Ablation:
    """Runs of one recipe with several seeds."""

    def __init__(self, argv: Sequence[str], seeds: Sequence[int], split: str, world: World) -> None:
        """Train the dedicated networks of both ends where they are missing.

        Args:
            argv: Arguments of `load_config`.
            seeds: Seeds of every row.
            split: Split that is measured.
            world: This process.
        """
        self.argv, self.seeds, self.split, self.world = list(argv), seeds, split, world
        self.base = load_config(self.argv)
        self.data: PreparedData = open_data(self.base)
        first = load_config(self.argv, {"seed": seeds[0]})
        self.frame: Frame = dedicated_frame(dedicated_points(first, (0.0, 1.0), self.data, world, split))

    def row(self, row: str) -> dict[str, object]:
        """Train and measure what a row stands for, or read what was measured."""
        told, norm = row.split(",")
        own = {"name": f"{self.base.name}-{told}-{norm}", "evaluation.split": "val", **settings_of(row)}
        configs: list[Config] = [load_config(self.argv, {"seed": seed, **own}) for seed in self.seeds]
        runs = [trained(config, self.data, self.world) for config in configs]
        lambdas, attack = self.base.evaluation.lambdas, EvaluationAttack.of(self.base)
        curves = [measure_run(run, lambdas, attack, data=self.data, split=self.split, world=self.world) for run in runs]
        scores = [frontier_score(curve, self.frame) for curve in curves]
        shares = [monotonicity(curve) for curve in curves]
        found: dict[str, object] = {"film": "none" if told == "float" else told, "norm": norm}
        found |= {"kind": "float" if told == "float" else "film", "score": round(statistics.mean(scores), 3)}
        found["score_std"] = round(statistics.stdev(scores), 3) if len(scores) > 1 else None
        for lam in (0.0, 0.2, 1.0):
            for key in ("sa", "ra"):
                values = [point[key] for curve in curves for point in curve if point["lam"] == lam]
                found[f"{key}_{lam:g}"] = round(100 * statistics.mean(values), 2) if values else None
        found |= {f"monotone_{k}": round(statistics.mean(s[k] for s in shares), 3) for k in ("sa", "ra")}
        found |= {"parameters": num_parameters(runs[0]), "images_per_s": images_per_s(runs[0])}
        print(found, file=sys.stderr, flush=True)
        return found


def together(
    rows: Sequence[Mapping[str, object]], conditions: Mapping[str, object], path: pathlib.Path
) -> list[dict[str, object]]:
    """Rows measured now with those that stand in a file, in the order of `ROWS`.

    Args:
        rows: From `Ablation.row`.
        conditions: Where, with what, which recipe and seeds; old rows that differ in any but the commit go.
        path: The file; there need not be one.
    """
    named = {_name(row): row | conditions for row in rows}
    same = [name for name in conditions if name not in ("commit", "dirty")]
    old = {_name(row): row for row in kept(path, list(named.values()), same)}
    return [dict(row) for name in ROWS if (row := named.get(name) or old.get(name))]


def report(rows: Sequence[Mapping[str, object]], plain: int) -> str:
    """The table and its conditions.

    Args:
        rows: From `together`.
        plain: Parameters of the network without conditioning.
    """
    last = list(rows[0]).index("images_per_s") + 1
    shown = [dict(list(row.items())[:last]) for row in rows]
    shown = [{**row, "over_plain_percent": round(100 * (row["parameters"] / plain - 1), 1)} for row in shown]
    conditions = {name: " ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in list(rows[0])[last:]}
    return f"{markdown(shown)}\n\n{describe(conditions)}"


def main(argv: Sequence[str]) -> None:
    """Train what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="FILM,NORM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", choices=("val", "test"), default="val")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/reproduction.md")
    args, rest = parser.parse_known_args(argv)
    if not any(argument.startswith("--config") for argument in rest):
        rest = ["--config=launch/configs/digits.yaml", "--data.loader=memory", *rest]
    with init_world(load_config(rest).engine.threads) as world:
        ablation = Ablation(rest, args.seeds, args.split, world)
        rows = [ablation.row(row) for row in args.rows]
        plain = trained(_plain(ablation), ablation.data, world)
        conditions = {"split": args.split, "images": ablation.data.counts[args.split]}
        conditions |= {"seeds": " ".join(map(str, args.seeds)), "recipe": fingerprint(ablation.base)}
        conditions |= environment(world.device)
    path = RESULTS / f"conditioning_{ablation.base.name}_{args.split}.csv"
    rows = together(rows, conditions, path)
    text = report(rows, num_parameters(plain))
    print(text)
    save(rows, path)
    if args.docs:
        put_into_docs(f"conditioning {ablation.base.name}" + (" validation" if args.split == "val" else ""), text)


def _name(row: Mapping[str, object]) -> str:
    return f"{'float' if row['kind'] == 'float' else row['film']},{row['norm']}"


def _plain(ablation: Ablation) -> Config:
    """A run whose network has no conditioning: a dedicated one of the frame."""
    return dedicated_config(load_config(ablation.argv, {"seed": ablation.seeds[0]}), 0.0, ablation.seeds[0])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
