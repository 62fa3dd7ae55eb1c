"""How fast is a whole training step, how much memory does it take, and where does the time go?

    python benchmarks/train_step.py [--model resnet8] [--batch-size 128] [--rounds 7] [--without a b c] [--docs]

Measures the arrangements of `arrangements.py` - ours; a: as published, float32; b: the published one with autocast,
channels_last and torch.compile; c: a clean step of the plain network - in one run. They take turns, so ratios hold on
a machine whose speed drifts; warm-up is not timed. The host waits for a GPU once per turn. Memory is measured before,
in one process per arrangement: on a GPU the allocator's peak, on a CPU the growth of resident memory since the
imports (with the C library's slack and, for b, the compiler's own memory; an approximation). An arrangement that fails
there is left out, and the exit code is then 1.

"Cost ratio" is the time per image of ours over that of c. An OAT image costs 17.17 forward units (docs/design.md), a
clean one 3, so 5.7 by arithmetic; on a GPU it should stay within 1.15 times that.

Precision `auto` is bf16 where the device has bf16 instructions, else fp32. Prints a table and writes
benchmarks/results/train_step_<model>.csv; --docs also puts the table into docs/reproduction.md.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from arrangements import ARRANGEMENTS, NUM_CLASSES, Setting, Step, random_set
from measuring import PeakMemory, Stopwatch, choose_precision, in_turns, last_line_of, ratios, spread, wait_for
from table import RESULTS, describe, environment, markdown, put_into_docs, save

from oat_dist.config import AttackConfig, Config, DataConfig, EngineConfig, ModelConfig, OptimConfig
from oat_dist.data import Batch
from oat_dist.distributed import default_device

SHAPES = {
    "resnet8": (8, 8, 1),
    "wrn10_2": (32, 32, 3),
    "resnet34": (32, 32, 3),
    "wrn16_8": (32, 32, 3),
    "wrn40_2": (96, 96, 3),
}
GPU_BATCHES = {"resnet34": 512, "wrn16_8": 512, "wrn40_2": 128}
CPU_BATCHES = {"resnet8": 128, "wrn10_2": 64}
TITLES = {
    "ours": "ours",
    "a": "a published",
    "b": "b published + autocast, channels_last, torch.compile",
    "c": "c clean step, plain network",
}
PHASES = ("data", "attack", "train_forward", "train_backward", "optimizer", "graph")
COST_BOUND = 1.15 * 17.17 / 3


def make_batch(shape: tuple[int, ...], batch_size: int) -> tuple[Batch, torch.Tensor]:
    """Random images, and lambdas as the paper draws them: one sixth 0, those first."""
    gen = torch.Generator().manual_seed(0)
    choices = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 1.0], dtype=torch.float64)
    batch = Batch(
        image_NCHW=torch.rand(batch_size, *shape, generator=gen).contiguous(memory_format=torch.channels_last),
        label_N=torch.randint(NUM_CLASSES, (batch_size,), generator=gen),
        index_N=torch.arange(batch_size),
        position_N=torch.arange(batch_size),
    )
    return batch, choices.repeat_interleave(-(-batch_size // 6))[:batch_size]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="resnet8")
    add("--batch-size", type=int, help="images; default: by model and device")
    add("--rounds", type=int, default=7, help="timed turns of each, after the warm-up")
    add("--steps", type=int, help="steps of a turn; default: 1 on a CPU, 5 on a GPU")
    add("--without", nargs="+", choices=["a", "b", "c"], default=[], help="arrangements to leave out")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of all but a, which is fp32")
    add("--device", type=torch.device, default=default_device())
    add("--docs", action="store_true", help="put the table into docs/reproduction.md")
    add("--out", type=pathlib.Path, help="CSV file; default: benchmarks/results/train_step_<model>.csv")
    add("--only", choices=list(ARRANGEMENTS), help="print seconds and memory of one arrangement as JSON, nothing else")
    args = parser.parse_args(argv)
    is_gpu = args.device.type == "cuda"
    batches, other = (GPU_BATCHES, 512) if is_gpu else (CPU_BATCHES, 12)
    args.batch_size = args.batch_size or batches.get(args.model, other)
    args.steps = args.steps or (5 if is_gpu else 1)
    args.precision = choose_precision(args.precision, args.device)
    args.out = args.out or RESULTS / f"train_step_{args.model}.csv"
    return args


def make_setting(args: argparse.Namespace, folder: str) -> Setting:
    """Configuration, random images and device of a measurement."""
    config = Config(
        model=ModelConfig(name=args.model),
        data=DataConfig(loader="memory"),
        attack=AttackConfig(eps_255=8.0, steps=7),
        optim=OptimConfig(lr=0.01, batch_size=args.batch_size),
        engine=EngineConfig(precision=args.precision),
    )
    data = random_set(pathlib.Path(folder), SHAPES[args.model], max(3 * args.batch_size, 256))
    return Setting(config=config, data=data, device=args.device)


def turn(step: Step, steps: int, clock: Stopwatch, device: torch.device) -> float:
    """Seconds per step of a few steps in a row."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(steps):
        clock.start()
        step(clock)
    wait_for(device)
    return (time.perf_counter() - start) / steps


def measure_one(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Seconds per step and peak memory of one arrangement, which should be alone in its process."""
    if name == "b":
        # What the compiler imports is no memory of the step.
        import torch._inductor.compile_fx  # noqa: F401
    with tempfile.TemporaryDirectory() as folder:
        setting = make_setting(args, folder)
        memory, clock = PeakMemory(args.device), Stopwatch(args.device)
        step = ARRANGEMENTS[name](setting)
        turn(step, 2, clock, args.device)
        memory.restart()
        seconds = [turn(step, args.steps, clock, args.device) for _ in range(args.rounds)]
        return {"seconds": seconds, **memory.read_mib()}


def alone(name: str, args: argparse.Namespace, *, rounds: int) -> dict[str, object]:
    """`measure_one` in a process of its own."""
    options = {
        "model": args.model, "batch-size": args.batch_size, "rounds": rounds, "steps": args.steps,
        "precision": args.precision, "device": args.device,
    }  # fmt: skip
    return json.loads(last_line_of("train_step.py", [*(f"--{k}={v}" for k, v in options.items()), f"--only={name}"]))


def alone_or_left_out(names: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, object]]:
    """`alone` of every arrangement that runs at all; why another does not is said on standard error.

    Raises:
        RuntimeError: Ours does not.
    """
    found = {}
    for name in names:
        try:
            found[name] = alone(name, args, rounds=1)
        except RuntimeError as error:
            if name == "ours":
                raise
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{name} alone: {found[name]}", file=sys.stderr, flush=True)
    return found


def measure(names: Sequence[str], args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per arrangement that runs."""
    memory = alone_or_left_out(names, args)
    names = list(memory)
    clocks = {name: Stopwatch(args.device) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        setting = make_setting(args, folder)
        steps = {name: ARRANGEMENTS[name](setting) for name in names}
        for name, step in steps.items():
            turn(step, 2, clocks[name], args.device)
            clocks[name].read_ms()

        def run(name: str) -> Callable[[], float]:
            return lambda: turn(steps[name], args.steps, clocks[name], args.device)

        seconds = in_turns({name: run(name) for name in names}, args.rounds)
    common = {"model": args.model, "image": "x".join(map(str, SHAPES[args.model])), "batch_size": args.batch_size}
    rows = []
    for name in names:
        per_step = spread(seconds[name], 6)
        phases = clocks[name].read_ms()
        relative = spread(ratios(seconds[name], seconds["ours"]))
        rows.append(
            common
            | {
                "arrangement": TITLES[name],
                "precision": "fp32" if name == "a" else args.precision,
                "images_per_s": round(args.batch_size / per_step["median"], 2),
                "step_ms": round(1000 * per_step["median"], 3),
                **{
                    f"{phase}_ms": round(phases[phase] / (args.rounds * args.steps), 3) if phase in phases else None
                    for phase in PHASES
                },
                **{key: round(value, 1) for key, value in memory[name].items() if key.endswith("mib")},
                **{f"time_over_ours_{key}": value for key, value in relative.items()},
                "rounds": args.rounds,
                "steps_per_round": args.steps,
            }
        )
    if "c" in names:
        cost = spread(ratios(seconds["ours"], seconds["c"]))
        rows = [row | {f"cost_ratio_{key}": value for key, value in cost.items()} for row in rows]
    return rows


def report(rows: Sequence[dict[str, object]]) -> str:
    """The table for people, with a line on conditions and one on the cost ratio."""
    first = rows[0]
    has_graph = any(row["graph_ms"] is not None for row in rows)
    shown = [
        {
            "arrangement": row["arrangement"],
            "precision": row["precision"],
            "images/s": row["images_per_s"],
            "time / ours: median (min to max)": "{} ({} to {})".format(
                *(row[f"time_over_ours_{key}"] for key in ("median", "min", "max"))
            ),
            **{
                f"{phase.replace('_', ' ')} ms": row[f"{phase}_ms"] for phase in PHASES if phase != "graph" or has_graph
            },
            "peak MiB": row["peak_mib"],
            **({"reserved MiB": row["reserved_mib"]} if "reserved_mib" in row else {}),
        }
        for row in rows
    ]
    lines = [markdown(shown), ""]
    if "cost_ratio_median" in first:
        values = "{} ({} to {})".format(*(first[f"cost_ratio_{key}"] for key in ("median", "min", "max")))
        lines.append(f"Cost ratio (ours / c, time per image): {values}; at most {COST_BOUND:.2f} asked for on a GPU.\n")
    keys = ["model", "image", "batch_size", "rounds", "steps_per_round"]
    keys += ["device", "threads", "cpu_bf16", "torch", "triton", "commit", "dirty"]
    return "\n".join([*lines, describe({key: first[key] for key in keys})])


def main() -> int:
    """Measure, print, write; 1 if an arrangement was left out that was asked for."""
    args = parse()
    torch.backends.cudnn.benchmark = True
    if args.only:
        print(json.dumps(measure_one(args.only, args)))
        return 0
    names = [name for name in ARRANGEMENTS if name not in args.without]
    rows = [row | environment(args.device) for row in measure(names, args)]
    text = report(rows)
    print(text)
    save(rows, args.out)
    if args.docs:
        put_into_docs(f"train_step {args.model}", text)
    return int(len(rows) < len(names))


if __name__ == "__main__":
    sys.exit(main())
