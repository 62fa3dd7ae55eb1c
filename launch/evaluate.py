"""Measure a trained network at any lambdas, on any split, under any strength of PGD.

    python launch/evaluate.py --run RUN --lambdas 0 0.05 0.1 1 --attack pgd --steps 20 --eps-255 8 --split test
    python launch/evaluate.py --run RUN --widths 0.5 0.75 1               of a slimmable network (model.widths)

Writes RUN/eval/<split>_<attack>_<norm>_eps<eps>.json with a figure beside it (numbered when that exists), prints a
table.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.config import DataConfig
from oat_dist.data import SPLITS, open_prepared
from oat_dist.distributed import World, default_device
from oat_dist.errors import require
from oat_dist.evaluation import EvaluationAttack
from oat_dist.report import measure
from oat_dist.runs import free_stem, load_run


def main(argv: Sequence[str]) -> None:
    """Parse, load the run, measure, write."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run", required=True, help="folder of a finished run")
    add("--lambdas", type=float, nargs="+", help="values in [0, 1]; default: those of the run")
    add("--widths", type=float, nargs="+", help="of model.widths; default: those of the run")
    add("--attack", choices=["pgd"], default="pgd", help="kind of attack")
    add("--steps", type=int, default=20, help="gradient steps")
    add("--restarts", type=int, default=1, help="random starts; an image must withstand all")
    add("--eps-255", type=float, help="radius in grey levels; default: that of training")
    add("--step-size-255", type=float, help="step size in grey levels; default: min(1.25 eps, eps + 4) / steps")
    add("--norm", choices=["linf", "l2"], help="norm of the ball; default: that of training")
    add("--split", choices=SPLITS, default="test")
    add("--batch-size", type=int, default=512, help="images per forward pass and rank")
    add("--loader", choices=["ffcv", "memory"], help="default: that of training")
    add("--data-root", help="folder of the prepared data sets; default: that of training")
    args = parser.parse_args(argv)

    config, network = load_run(args.run)
    lambdas = tuple(sorted(set(args.lambdas or config.evaluation.lambdas)))
    require(all(0 <= lam <= 1 for lam in lambdas), "--lambdas", lambdas, "every lambda must lie in [0, 1]")
    widths = tuple(sorted(set(args.widths or network.slimming.widths), reverse=True))
    for width in widths:
        network.slimming.require(width, "--widths")
    for name in ("steps", "restarts", "batch_size"):
        require(getattr(args, name) >= 1, f"--{name.replace('_', '-')}", getattr(args, name), "must be at least 1")
    eps_255 = config.attack.eps_255 if args.eps_255 is None else args.eps_255
    require(eps_255 >= 0, "--eps-255", eps_255, "must be at least 0")
    require(args.step_size_255 is None or args.step_size_255 > 0, "--step-size-255", args.step_size_255, "must be > 0")
    attack = EvaluationAttack(
        norm=args.norm or config.attack.norm,
        eps=eps_255 / 255,
        steps=args.steps,
        step_size=None if args.step_size_255 is None else args.step_size_255 / 255,
        restarts=args.restarts,
    )
    reading = {"loader": args.loader, "root": args.data_root}
    data_config: DataConfig = dataclasses.replace(config.data, **{k: v for k, v in reading.items() if v is not None})
    config = dataclasses.replace(config, data=data_config)
    data = open_prepared(data_config.root, data_config.dataset)

    with _world(config.engine.threads) as world:
        folder = pathlib.Path(args.run) / "eval"
        stem = world.on_main(lambda: free_stem(folder, f"{args.split}_{attack.name}_{attack.norm}_eps{eps_255:g}"))
        measure(
            network.to(world.device), data, attack, lambdas,
            config=config, split=args.split, batch_size=args.batch_size, world=world, stem=stem, widths=widths,
        )  # fmt: skip


def _world(threads: int) -> World:
    """The launcher's ranks, or this process alone without DeepSpeed."""
    if "RANK" not in os.environ:
        return World(device=default_device())
    from oat_dist.engine import init_world

    return init_world(threads)


if __name__ == "__main__":
    run_main(main)
