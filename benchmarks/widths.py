"""Widths trained together (OATS): what a step of all costs beside steps of each alone, and how good they become.

    python benchmarks/widths.py cost [--widths 0.5 0.75 1] [--model resnet8] [--batch-size 128] [--rounds 7] [--docs]
    python benchmarks/widths.py accuracy [--widths 0.5 0.75 1] [--alone 1] [--seeds 0 1 2] [--lr-together LR] [--docs]

"cost" measures, in turns, an optimiser step of the slimmable network and one of each plainly built network of the same
channels (random images, attack of 7 steps), on a CPU by the processor's clock. "all_over_sum" is the former over the
sum of the latter; "all_over_flops" is it over the step of width 1 times the sum of all widths' FLOPs as shares of that
width's, and should be at most 1.1; it counts against widths too that narrow layers do fewer operations a second.
"accuracy" trains the slimmable network (OATS) and the plain ones (OAT) on one recipe, by default the digits, and puts
SA and RA at lambda 0, 0.2 and 1 side by side; --key=value changes the recipe, --alone leaves plain ones of other widths
out, and runs that are there are not trained again. The losses of all widths add up, so with SGD the slimmable network
may want a lower rate than the recipe's: --lr-together. --weights-together 0.3 0.3 1 lets the narrow widths count less.
Both write benchmarks/results/widths_<part>_<name>.csv.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from arrangements import NUM_CLASSES, Setting, draw_batches, random_set
from measuring import in_turns, ratios, spread, wait_for
from table import RESULTS, describe, environment, markdown, put_into_docs, save
from trained import images_per_s, num_parameters, trained

from oat_dist.config import AttackConfig, Config, DataConfig, ModelConfig, OptimConfig
from oat_dist.config_io import load_config
from oat_dist.cost import width_costs
from oat_dist.dedicated import measure_run
from oat_dist.distributed import World, default_device
from oat_dist.engine import init_world
from oat_dist.errors import UserError
from oat_dist.evaluation import EvaluationAttack
from oat_dist.export import cut_config
from oat_dist.graphed import graph_replay
from oat_dist.models import build_model
from oat_dist.models.slimming import widths_of_step
from oat_dist.optim import build_optimizer
from oat_dist.runs import load_run
from oat_dist.step import training_losses
from oat_dist.trainer import open_data

BOUND = 1.1  # of all_over_flops
LAMBDAS = (0.0, 0.2, 1.0)


def one_step(config: Config, setting: Setting) -> Callable[[], float]:
    """Seconds of one optimiser step of a configuration, all its widths, as the trainer takes it on one rank."""
    setting = dataclasses.replace(setting, config=config)
    network = build_model(config, in_channels=setting.data.image_shape[2], num_classes=NUM_CLASSES)
    network.to(setting.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(network, config.optim)
    batches, replay = draw_batches(setting), graph_replay(config.engine.cuda_graph, setting.device, name="attack")

    # Other programs on the processors do not count.
    clock = time.process_time if setting.device.type == "cpu" else time.perf_counter

    def run() -> float:
        epoch, batch, lam_N = next(batches)
        wait_for(setting.device)
        start = clock()
        for width in widths_of_step(config.model, config.seed, epoch):
            losses = training_losses(
                network, batch, lam_N, config=config, epoch=epoch, forward=network, replay=replay, width=width
            )
            losses.loss_N.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        wait_for(setting.device)
        return clock() - start

    return run


def cost_rows(
    model: str, widths: Sequence[float], *, batch_size: int, rounds: int, size: int, device: torch.device
) -> list[dict[str, object]]:
    """Seconds of a step of all widths together and of each alone, and their ratio per round."""
    config = Config(
        model=ModelConfig(name=model, widths=tuple(widths)), data=DataConfig(loader="memory"),
        attack=AttackConfig(eps_255=8.0, steps=7), optim=OptimConfig(lr=0.01, batch_size=batch_size),
    )  # fmt: skip
    configs = {"all": config} | {f"{width:g}": cut_config(config, width) for width in widths}
    with tempfile.TemporaryDirectory() as folder:
        data = random_set(pathlib.Path(folder), (size, size, 3), max(3 * batch_size, 256))
        setting = Setting(config=config, data=data, device=device)
        runs = {name: one_step(of_width, setting) for name, of_width in configs.items()}
        in_turns(runs, 2)
        seconds = in_turns(runs, rounds)
    alone = [sum(parts) for parts in zip(*(seconds[name] for name in configs if name != "all"), strict=True)]
    network = build_model(config, in_channels=3, num_classes=NUM_CLASSES)
    flops = [cost["forward_flops"] for cost in width_costs(network, (3, size, size))]
    by_flops = [second * sum(flops) / flops[0] for second in seconds["1"]]
    ratio = {"sum": spread(ratios(seconds["all"], alone)), "flops": spread(ratios(seconds["all"], by_flops))}
    common = {"model": model, "image": f"{size}x{size}x3", "batch_size": batch_size, "rounds": rounds}
    return [
        common
        | {"widths": name, "step_ms": round(1000 * statistics.median(seconds[name]), 2)}
        | {
            f"all_over_{of}_{key}": value if name == "all" else None
            for of, values in ratio.items()
            for key, value in values.items()
        }
        for name in configs
    ]


def accuracy_rows(
    argv: Sequence[str], widths: Sequence[float], seeds: Sequence[int], world: World, *,
    changes: Mapping[str, object] | None = None, alone: Sequence[float],
) -> list[dict[str, object]]:  # fmt: skip
    """SA and RA of every width, trained together (with settings of its own, if any) and alone; means over seeds."""
    base = load_config(argv)
    data, attack = open_data(base), EvaluationAttack.of(base)
    own = {"name": f"{base.name}-oats", "evaluation.split": "val", "model.widths": list(widths)}
    slim = [load_config(argv, own | {"seed": seed}) for seed in seeds]
    together = [trained(load_config(argv, own | (changes or {}) | {"seed": seed}), data, world) for seed in seeds]
    height, width_px, channels = data.image_shape
    costs = {c["width"]: c for c in width_costs(load_run(together[0])[1], (channels, height, width_px))}
    rows = []
    for width in reversed(widths):
        plain = [trained(cut_config(config, width), data, world) for config in slim] if width in alone else []
        # A plain network is all of itself.
        for name, runs, share in (("OATS", together, width), ("OAT", plain, 1.0))[: 2 if plain else 1]:
            points = [
                point
                for run in runs
                for point in measure_run(run, LAMBDAS, attack, data=data, split="test", world=world, width=share)
            ]
            row: dict[str, object] = {"width": width, "training": name}
            for lam in LAMBDAS:
                for key in ("sa", "ra"):
                    values = [100 * p[key] for p in points if p["lam"] == lam]
                    row[f"{key}_{lam:g}"] = round(statistics.mean(values), 2)
                    row[f"{key}_{lam:g}_std"] = round(statistics.stdev(values), 2) if len(values) > 1 else None
            row |= {"parameters": num_parameters(runs[0]) if name == "OAT" else costs[width]["parameters"]}
            row |= {
                "forward_mflops": round(costs[width]["forward_flops"] / 1e6, 3),
                "images_per_s": images_per_s(runs[0]),
            }
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def _write(rows: list[dict[str, object]], conditions: dict[str, object], name: str, *, docs: bool) -> None:
    shown = [{key: value for key, value in row.items() if not key.endswith("_std")} for row in rows]
    text = f"{markdown(shown)}\n\n{describe(conditions)}"
    print(text)
    save([row | conditions for row in rows], RESULTS / f"{name.replace(' ', '_')}.csv")
    if docs:
        put_into_docs(name, text)


def main(argv: Sequence[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("part", choices=["cost", "accuracy"])
    add("--widths", nargs="+", type=float, default=[0.5, 0.75, 1.0])
    add("--model", default="resnet8", help="cost: network")
    add("--batch-size", type=int, default=128, help="cost: images")
    add("--size", type=int, default=32, help="cost: side of the images")
    add("--rounds", type=int, default=7, help="cost: timed turns of each, after the warm-up")
    add("--seeds", nargs="+", type=int, default=[0], help="accuracy")
    add("--alone", nargs="+", type=float, help="accuracy: widths that are also trained alone; default: all")
    add("--lr-together", type=float, help="accuracy: learning rate of the slimmable network; default: the recipe's")
    add("--weights-together", nargs="+", type=float, help="accuracy: loss.width_weights of the slimmable network")
    add("--docs", action="store_true", help="put the table into docs/reproduction.md")
    args, rest = parser.parse_known_args(argv)
    if args.part == "cost":
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        device = default_device()
        rows = cost_rows(args.model, args.widths, batch_size=args.batch_size, rounds=args.rounds, size=args.size,
                         device=device)  # fmt: skip
        _write(rows, {"asked_for": f"<= {BOUND}"} | environment(device), f"widths cost {args.model}", docs=args.docs)
        return
    if not any(argument.startswith("--config") for argument in rest):
        rest = ["--config=launch/configs/digits.yaml", "--data.loader=memory", *rest]
    config, alone = load_config(rest), args.alone or args.widths
    if strange := set(alone) - set(args.widths):
        parser.error(f"--alone {' '.join(f'{width:g}' for width in strange)}: not among --widths")
    with init_world(config.engine.threads) as world:
        own = {"optim.lr": args.lr_together, "loss.width_weights": args.weights_together}
        changes = {key: value for key, value in own.items() if value is not None}
        rows = accuracy_rows(rest, args.widths, args.seeds, world, changes=changes, alone=alone)
        conditions = {"seeds": " ".join(map(str, args.seeds)), "lr_together": args.lr_together or config.optim.lr}
        conditions |= {"weights_together": " ".join(f"{w:g}" for w in args.weights_together or [1] * len(args.widths))}
        conditions |= environment(world.device)
    _write(rows, conditions, f"widths accuracy {config.name}", docs=args.docs)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
