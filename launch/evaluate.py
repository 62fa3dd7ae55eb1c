"""Measure a trained network at any lambdas, on any split, under any attacks, with confidence intervals.

    python launch/evaluate.py --run RUN --lambdas 0 0.05 0.1 1 --attack autoattack pgd-50x5 cw-20 --eps-255 8
    python launch/evaluate.py --run RUN --attack pgd-20 --attack-lambdas --random-lambda 10
    python launch/evaluate.py --run RUN --target-sa 0.90
    python launch/evaluate.py --run RUN --widths 0.5 0.75 1               of a slimmable network (model.widths)

Writes RUN/eval/<split>_<attack>_<norm>_eps<eps>.json with a figure beside it (numbered when that exists), and prints a
table. The same command goes on after a kill.
"""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence

from launch import ArgumentParser, run_main
from oat_dist.config import Config, DataConfig
from oat_dist.data import SPLITS, PreparedData, evaluation_batches, open_prepared
from oat_dist.dedicated import measured_before
from oat_dist.distributed import World, default_device
from oat_dist.errors import require
from oat_dist.evaluation import AttackList, EvaluationAttack, Plan, evaluate, parse_attacks
from oat_dist.evaluation.choice import GRID, choose, meeting
from oat_dist.evaluation.specs import EVALUATION_NORMS
from oat_dist.models.network import ConditionalNetwork
from oat_dist.report import measure
from oat_dist.runs import free_stem, load_run, require_same_images


def main(argv: Sequence[str]) -> None:
    """Parse, load the run, perhaps choose a lambda, measure, write."""
    args = _parser().parse_args(argv)
    config, network = load_run(args.run)
    _check(args)
    wants = next((key for key in ("sa", "ra") if getattr(args, f"target_{key}") is not None), None)
    lambdas = tuple(sorted(set(args.lambdas or (GRID if wants else config.evaluation.lambdas))))
    through = None if args.attack_lambdas is None else tuple(sorted(set(args.attack_lambdas or lambdas)))
    for name, values in (("--lambdas", lambdas), ("--attack-lambdas", through or ())):
        require(all(0 <= lam <= 1 for lam in values), name, values, "every lambda must lie in [0, 1]")
    widths = _widths(args, network, has_target=wants is not None)
    attack = _attack(args, config)
    reading = {"loader": args.loader, "root": args.data_root}
    data_config: DataConfig = dataclasses.replace(config.data, **{k: v for k, v in reading.items() if v is not None})
    config = dataclasses.replace(config, data=data_config)
    data = open_prepared(data_config.root, args.dataset or data_config.dataset)
    require_same_images(args.run, data)

    with _world(config.engine.threads) as world:
        network.to(world.device)
        stem = _stem(args, args.split, data, attack, world)
        chosen = {}
        if wants:
            chosen = _choose(args, config, network, data, attack, lambdas, wants, widths, world)
            lambdas = (chosen["lam"],)
        plan = Plan(
            lambdas=lambdas,
            attack=attack,
            attack_lambdas=through or (),
            random_draws=args.random_lambda,
            precision=args.precision,
            seed=config.seed,
        )
        measure(
            network, data, plan, config=config, split=args.split, batch_size=args.batch_size, world=world, stem=stem,
            widths=widths, num_images=args.num_images, more={"chosen": chosen} if chosen else None,
        )  # fmt: skip


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--run", required=True, help="folder of a finished run")
    add("--lambdas", type=float, nargs="+", help="values in [0, 1]; default: those of the run")
    add("--widths", type=float, nargs="+", help="of model.widths; default: those of the run, with a target the largest")
    add("--attack", nargs="+", default=["pgd"], metavar="NAME",
        help="pgd, cw, mim, pgd-t, each with -STEPS[xRESTARTS]; autoattack, apgd-ce, apgd-t, fab-t, square; an image "
        "must withstand all")  # fmt: skip
    add("--steps", type=int, default=20, help="gradient steps of names without")
    add("--restarts", type=int, default=1, help="random starts of names without; an image must withstand all")
    add("--targets", type=int, help="wrong classes that pgd-t aims at, most likely first; default: all")
    add("--eps-255", type=float, help="radius in grey levels; default: that of training")
    add("--step-size-255", type=float, help="step size in grey levels; default: min(1.25 eps, eps + 4) / steps")
    add("--norm", help="norm of the ball: linf, l2, l1 (autoattack alone); default: that of training")
    add("--attack-lambdas", type=float, nargs="*", metavar="LAMBDA",
        help="lambdas that the attacker may go through as well; none named: all that are measured")  # fmt: skip
    add("--random-lambda", type=int, nargs="?", const=10, default=0, metavar="DRAWS",
        help="measure too how it fares with lambda drawn for every query, against an attacker who averages over this "
        "many draws")  # fmt: skip
    add("--target-sa", type=float, help="choose, on validation, the lambda with the highest RA that has this SA")
    add("--target-ra", type=float, help="choose, on validation, the lambda with the highest SA that has this RA")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the gradients; successes are checked in fp32")
    add("--split", choices=SPLITS, default="test")
    add("--num-images", type=int, help="only so many images of the split, evenly spread")
    add("--batch-size", type=int, default=512, help="images per forward pass and rank")
    add("--loader", choices=["ffcv", "memory"], help="default: that of training")
    add("--data-root", help="folder of the prepared data sets; default: that of training")
    add("--dataset", help="another prepared data set of the same images and classes; default: that of training")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name in ("steps", "restarts", "batch_size", "targets", "num_images"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')}", value, "must be at least 1")
    require(args.random_lambda >= 0, "--random-lambda", args.random_lambda, "must be at least 0")
    require(args.eps_255 is None or args.eps_255 >= 0, "--eps-255", args.eps_255, "must be at least 0")
    require(args.step_size_255 is None or args.step_size_255 > 0, "--step-size-255", args.step_size_255, "must be > 0")
    for key in ("sa", "ra"):
        target = getattr(args, f"target_{key}")
        require(target is None or 0 <= target <= 1, f"--target-{key}", target, "must lie in [0, 1]")
    both = args.target_sa is not None and args.target_ra is not None
    require(not both, "--target-sa", args.target_sa, "cannot be together with --target-ra")
    has_target = args.target_sa is not None or args.target_ra is not None
    expected = "lambda is chosen on val, so it must be reported on another split"
    require(not (has_target and args.split == "val"), "--split", args.split, expected)
    require(args.norm in (None, *EVALUATION_NORMS), "--norm", args.norm, f"must be one of {EVALUATION_NORMS}")


def _attack(args: argparse.Namespace, config: Config) -> EvaluationAttack | AttackList:
    eps_255 = config.attack.eps_255 if args.eps_255 is None else args.eps_255
    return parse_attacks(
        args.attack,
        eps=eps_255 / 255,
        norm=args.norm or config.attack.norm,
        steps=args.steps,
        restarts=args.restarts,
        step_size=None if args.step_size_255 is None else args.step_size_255 / 255,
        targets=args.targets,
    )


def _choose(
    args: argparse.Namespace, config: Config, network: ConditionalNetwork, data: PreparedData,
    attack: EvaluationAttack | AttackList, lambdas: Sequence[float], key: str, widths: Sequence[float], world: World,
) -> dict:  # fmt: skip
    """What a report says of the lambda that was chosen on validation: by which target, from which points."""
    target, (width,) = getattr(args, f"target_{key}"), widths
    reading = {"batch_size": args.batch_size, "num_images": args.num_images}
    if key == "sa":
        # Lambdas without the accuracy need no attack.
        batches = evaluation_batches(data, "val", config.data, device=world.device, **reading)
        clean = AttackList("clean", attack.norm, attack.eps, ())
        points = evaluate(network, batches, lambdas, clean, world=world, width=width)
        lambdas = [point["lam"] for point in meeting(points, key, target)]
    run = pathlib.Path(args.run)
    points = world.on_main(lambda: measured_before(run, lambdas, attack, data, "val", args.num_images, width))
    if points is None:
        plan = Plan(lambdas=tuple(lambdas), attack=attack, precision=args.precision, seed=config.seed)
        stem = _stem(args, "val", data, attack, world)
        report = measure(
            network,
            data,
            plan,
            config=config,
            split="val",
            world=world,
            stem=stem,
            widths=widths,
            quiet=True,
            **reading,
        )
        points = report["points"]
    return {**choose(points, key, target), "target": {key: target}, "split": "val", "points": points}


def _widths(args: argparse.Namespace, network: ConditionalNetwork, *, has_target: bool) -> tuple[float, ...]:
    """Widths to measure, the largest first."""
    default = (1.0,) if has_target else network.slimming.widths
    widths = tuple(sorted(set(args.widths or default), reverse=True))
    for width in widths:
        network.slimming.require(width, "--widths")
    require(not (has_target and len(widths) > 1), "--widths", widths, "must be one, for which lambda is chosen")
    expected = "does not go with weight noise (conditioning.kind=float), which is drawn for every lambda by itself"
    require(not (args.random_lambda and network.is_stochastic), "--random-lambda", args.random_lambda, expected)
    return widths


def _stem(
    args: argparse.Namespace, split: str, data: PreparedData, attack: EvaluationAttack | AttackList, world: World
) -> pathlib.Path:
    """Where the report goes, without suffix."""
    other = f"{data.name}-" if args.dataset else ""
    name = f"{other}{split}_{attack.name}_{attack.norm}_eps{attack.eps * 255:g}"
    return world.on_main(lambda: free_stem(pathlib.Path(args.run) / "eval", name))


def _world(threads: int) -> World:
    """The launcher's ranks, or this process alone without DeepSpeed."""
    if "RANK" not in os.environ:
        return World(device=default_device())
    from oat_dist.engine import init_world

    return init_world(threads)


if __name__ == "__main__":
    run_main(main)
