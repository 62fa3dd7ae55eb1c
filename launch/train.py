"""Train one once-for-all network and measure its curve.

    deepspeed launch/train.py --config launch/configs/digits.yaml [--section.field=value ...]
    python launch/train.py --config launch/configs/digits.yaml            one process
    deepspeed --num_accelerators 2 launch/train.py --config ...           two processes, on a CPU too
    python launch/train.py --config launch/configs/digits.yaml --dry-run  what it would cost, nothing else

The same command goes on with a run that was killed (checkpoint.resume). Ends with the path of the run's page.
"""

import pathlib
import sys
from collections.abc import Sequence

from launch import run_main
from oat_dist.config_io import load_config

DRY_RUN = "--dry-run"


def main(argv: Sequence[str]) -> None:
    """Parse, join the other ranks, train, leave."""
    config = load_config([a for a in argv if a != DRY_RUN])
    if DRY_RUN in argv:
        from oat_dist.cost import print_cost

        print_cost(config)
        return
    # A mistake in the configuration is answered before the seconds that these imports take.
    from oat_dist.engine import init_world
    from oat_dist.trainer import train

    with init_world(config.engine.threads) as world:
        run = train(config, world, ends_process=True)
    if world.is_main:
        show(run)


def show(run: pathlib.Path) -> None:
    """Write the page of a run and print its path; where that fails, say so and how to try again."""
    from oat_dist.page import write_page

    path = run / "report.html"
    try:
        write_page([run], path)
    except Exception as error:  # The run is whole and measured: nothing about its page may make it fail.
        print(f"{path}: not written ({error}); python launch/report.py {run} tries again", file=sys.stderr)
    else:
        print(path)


if __name__ == "__main__":
    run_main(main)
