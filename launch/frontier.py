"""Train one dedicated network per lambda and seed, and hold conditional runs against them.

    python launch/frontier.py --config launch/configs/digits.yaml --lambdas 0 0.1 0.2 0.3 0.4 1 --seeds 3
    python launch/frontier.py --config ... --run runs/<seed 0> runs/<seed 1> runs/<seed 2> [--section.field=value ...]

Give the configuration and settings of the conditional runs: recipe, data and budget are theirs. A network that is there
already is not trained again, and the same command goes on after an interruption. Writes
<output_dir>/<name>_frontier/<split>.json, .csv, .png and .svg.
"""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch import ArgumentParser, run_main
from oat_dist.config import PAPER_LAMBDAS, Config
from oat_dist.config_io import load_config
from oat_dist.data import SPLITS
from oat_dist.errors import require

if TYPE_CHECKING:
    from oat_dist.distributed import World


def main(argv: Sequence[str]) -> None:
    """Parse, train what is missing, measure, compare, write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--lambdas",
        type=float,
        nargs="+",
        default=PAPER_LAMBDAS,
        help="in [0, 1], with both ends; default: the paper's",
    )
    add("--seeds", type=int, default=3, help="networks per lambda: seeds `seed`, `seed` + 1, ...")
    add("--run", type=pathlib.Path, nargs="+", default=[], help="finished conditional runs, one per seed, to compare")
    add("--grid", type=int, default=21, help="evenly spaced lambdas of the conditional curve in the figure")
    add("--split", choices=SPLITS, default="test")
    args, rest = parser.parse_known_args(argv)
    lambdas = tuple(sorted(set(args.lambdas)))
    ok = lambdas[0] == 0 and lambdas[-1] == 1
    require(ok, "--lambdas", lambdas, "must lie in [0, 1] and have both ends, which make the frame of the score")
    require(args.seeds >= 1, "--seeds", args.seeds, "must be at least 1")
    require(args.grid >= 2, "--grid", args.grid, "must be at least 2")
    config = load_config(rest)
    # A mistake in the arguments is answered before the seconds that this import takes.
    from oat_dist.engine import init_world

    with init_world(config.engine.threads) as world:
        measure_frontier(config, lambdas, world, seeds=args.seeds, runs=args.run, grid=args.grid, split=args.split)


def measure_frontier(
    config: Config,
    lambdas: Sequence[float],
    world: "World",
    *,
    seeds: int,
    runs: Sequence[pathlib.Path],
    grid: int,
    split: str,
) -> None:
    """Train the dedicated networks that are missing, measure all, and compare the runs with them."""
    from oat_dist.comparison import compare, print_comparison, write_comparison
    from oat_dist.dedicated import dedicated_config, find_trained, frontier_file, measure_run, require_same_recipe
    from oat_dist.evaluation import EvaluationAttack
    from oat_dist.runs import make_folder
    from oat_dist.trainer import open_data, train

    attack = EvaluationAttack.of(config)
    data = world.on_main(lambda: open_data(config))
    folder = world.on_main(lambda: make_folder(pathlib.Path(config.output_dir) / f"{config.name}_frontier"))
    for run in runs:
        require_same_recipe(run, config)
    networks = []
    for lam in lambdas:
        for seed in range(config.seed, config.seed + seeds):
            one = dedicated_config(config, lam, seed)
            run = world.on_main(lambda one=one: find_trained(one, data)) or train(one, world, ends_process=True)
            (point,) = measure_run(run, [lam], attack, data=data, split=split, world=world)
            networks.append({**point, "seed": seed, "run": str(run)})
    dedicated = frontier_file(config, networks, data=data, split=split, attack=attack)
    wanted = sorted({*lambdas, *(round(at / (grid - 1), 10) for at in range(grid))})
    curves = [measure_run(run, wanted, attack, data=data, split=split, world=world) for run in runs]
    if world.is_main:
        comparison = compare(dedicated["points"], curves)
        about = {key: value for key, value in dedicated.items() if key != "networks"} | {"runs": list(map(str, runs))}
        paths = write_comparison(comparison, {**about, "networks": networks}, folder / split)
        print_comparison(comparison, about)
        print(*paths, sep="\n")


if __name__ == "__main__":
    run_main(main)
