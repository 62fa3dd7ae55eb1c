"""Images per second of two recipes, for `recipe.py --time-ratio`: how many images the default sees in the same time.

    python benchmarks/recipe_speed.py [--rounds 7] [--batch-size 64] [--config FILE] [--section.field=value ...]

Measures, in turns, training steps on random images (memory loader, augmentation, attack, forward, backward, optimiser;
one rank) of

    default     the recipe of `--config` (launch/configs/cifar10_8k_wrn10_2.yaml), by this repository's step
    published   the published recipe of `recipe.py`, by the published arrangement (`published_step.py`)
    same step   the published recipe, by this repository's step

by the processor's clock on a CPU, on which `OMP_NUM_THREADS=1 --engine.threads=1` is more repeatable. "images" is the
default's images in the time of one of the row. Writes benchmarks/results/recipe_speed_<name of the configuration>.csv.
"""

import argparse
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import arrangements
from arrangements import Setting, Step, random_set
from measuring import Stopwatch, in_turns, ratios, spread, wait_for
from recipe import BASE, PUBLISHED
from table import RESULTS, describe, environment, markdown, put_into_docs, save

from oat_dist.config_io import load_config
from oat_dist.engine import init_world
from oat_dist.errors import UserError

_SHAPE_HWC = (32, 32, 3)


def measure(argv: Sequence[str], batch_size: int, rounds: int) -> list[dict[str, object]]:
    """One row per recipe and arrangement.

    Args:
        argv: Arguments of `load_config`: the default recipe.
        batch_size: Images of a step.
        rounds: Timed steps of each, after one that is not.
    """
    size = {"optim.batch_size": batch_size}
    default, published = load_config(argv, size), load_config(argv, PUBLISHED | size)
    with init_world(default.engine.threads) as world, tempfile.TemporaryDirectory() as folder:
        data = random_set(pathlib.Path(folder), _SHAPE_HWC, 3 * batch_size)
        clock = time.process_time if world.device.type == "cpu" else time.perf_counter

        def begun(build: Callable[[Setting], Step], config) -> Callable[[], float]:
            step, marks = build(Setting(config=config, data=data, device=world.device)), Stopwatch(world.device)

            def run() -> float:
                wait_for(world.device)
                start = clock()
                marks.start()
                step(marks)
                wait_for(world.device)
                return clock() - start

            run()
            return run

        runs = {
            "default": begun(arrangements.ours, default),
            "published": begun(arrangements.a, published),
            "same step": begun(arrangements.ours, published),
        }
        seconds = in_turns(runs, rounds)
        about = {"model": default.model.name, "batch_size": batch_size, "rounds": rounds}
        about |= {"clock": "processor" if clock is time.process_time else "wall"} | environment(world.device)
    rows = []
    for name, own in seconds.items():
        more = spread(ratios(own, seconds["default"]))
        row = {"recipe": name, "images_per_s": round(batch_size / spread(own, 6)["median"], 1)}
        rows.append(row | {f"images_{key}": value for key, value in more.items()} | about)
    return rows


def main(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/reproduction.md")
    args, rest = parser.parse_known_args(argv)
    if not any(argument.startswith("--config") for argument in rest):
        rest = [*BASE, *rest]
    rows = measure(rest, args.batch_size, args.rounds)
    own = ("recipe", "images_per_s", "images_median", "images_min", "images_max")
    conditions = {key: value for key, value in rows[0].items() if key not in own}
    text = f"{markdown([{key: row[key] for key in own} for row in rows])}\n\n{describe(conditions)}"
    print(text)
    name = load_config(rest).name
    save(rows, RESULTS / f"recipe_speed_{name}.csv")
    if args.docs:
        put_into_docs(f"recipe_speed {name}", text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
