"""Our evaluation against a plain loop: images per second and RA of PGD-20 at six lambdas, the two taking turns.

    python benchmarks/evaluation.py --run runs/<run> [--images 256] [--rounds 3] [--threads 1] [--docs]

The plain loop does the same attack from the same starts, for one lambda and batch after the other, on all images,
through the conditional forward, and looks at every iterate, all in float32. `ours` is `oat_dist.evaluation.run_plan`
in the batches of launch/evaluate.py; with --checks there is a row with the self-checks of a report, with --bf16 one
with gradients in bfloat16. Seconds are those of the processor on a CPU, which other programs may use too, and of the
clock on the wall on a GPU. Writes benchmarks/results/evaluation_<model>.csv.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from measuring import in_turns, ratios, spread, wait_for
from table import RESULTS, describe, environment, markdown, put_into_docs, save
from torch import Tensor

from oat_dist.attacks import NORMS, evaluation_mode, random_start
from oat_dist.config import PAPER_LAMBDAS
from oat_dist.data import Batch, evaluation_batches, open_prepared
from oat_dist.distributed import World, default_device
from oat_dist.evaluation import EvaluationAttack, Outcome, Plan, run_plan
from oat_dist.evaluation.checks import self_checks
from oat_dist.evaluation.loop import ROBUST
from oat_dist.models.network import ConditionalNetwork
from oat_dist.random import draw_keys
from oat_dist.runs import load_run

BATCH_SIZE = 512
"""The default of launch/evaluate.py."""


def plain_loop(network: ConditionalNetwork, batches: Sequence[Batch], plan: Plan) -> Tensor:
    """[L, M] bool: robust images by the plain way."""
    with evaluation_mode(network):
        rows = [torch.cat([_plain_batch(network, batch, lam, plan) for batch in batches]) for lam in plan.lambdas]
    return torch.stack(rows).cpu()


def _plain_batch(network: ConditionalNetwork, batch: Batch, lam: float, plan: Plan) -> Tensor:
    attack, x, label = plan.attack, batch.image_NCHW, batch.label_N
    geometry = NORMS[attack.norm]
    with torch.no_grad():
        cond = network.condition(torch.full((len(label),), lam, dtype=torch.float64))
        robust = network(x, cond).argmax(1) == label
    key = draw_keys(plan.seed, "evaluation start", 0, batch.index_N.to(x.device))
    x_adv = random_start(x, key, eps=attack.eps, norm=attack.norm)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_(True)
        logits = network(x_adv, cond)
        robust &= logits.argmax(1) == label
        loss = torch.nn.functional.cross_entropy(logits, label, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x_adv)
        moved = x_adv.detach() + attack.length * geometry.ascent(grad)
        x_adv = (x + geometry.project(moved - x, attack.eps)).clamp(0, 1)
    with torch.no_grad():
        return robust & (network(x_adv, cond).argmax(1) == label)


def _row(
    name: str, seconds: Sequence[float], plain: Sequence[float], robust_LM: Tensor, by_plain_LM: Tensor
) -> dict[str, object]:
    """One row of the table; accuracies in percent."""
    count = robust_LM.numel()
    faster = spread(ratios(plain, seconds), 2)
    off = 100 * (robust_LM.double().mean(1) - by_plain_LM.double().mean(1)).abs()
    return {
        "arrangement": name,
        "images/s": round(count / spread(seconds)["median"], 1),
        "plain / this: median (min to max)": f"{faster['median']} ({faster['min']} to {faster['max']})",
        "RA % per lambda": " ".join(f"{100 * value:.1f}" for value in robust_LM.double().mean(1).tolist()),
        "largest difference in RA, points": round(float(off.max()), 2),
        "images judged otherwise": int((robust_LM != by_plain_LM).sum()),
    }


def main(argv: Sequence[str]) -> None:
    """Measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--run", required=True, help="folder of a finished run")
    parser.add_argument("--data-root", help="folder of the prepared data sets; default: that of training")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=128, help="of the plain loop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checks", action="store_true", help="with self-checks too")
    parser.add_argument("--bf16", action="store_true", help="gradients in bfloat16 too")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/reproduction.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    world = World(device=default_device())
    config, network = load_run(args.run)
    network.to(world.device)
    data = open_prepared(args.data_root or config.data.root, config.data.dataset)
    batches, plain_batches = (
        evaluation_batches(data, "test", config.data, size, device=world.device, num_images=args.images)
        for size in (BATCH_SIZE, args.batch_size)
    )
    attack = EvaluationAttack(eps=config.attack.eps, norm=config.attack.norm, steps=20)
    plans = {"ours": Plan(lambdas=PAPER_LAMBDAS, attack=attack)}
    if args.bf16:
        plans["bf16"] = Plan(lambdas=PAPER_LAMBDAS, attack=attack, precision="bf16")
    found: dict[str, Tensor] = {}
    clock = time.process_time if world.device.type == "cpu" else time.perf_counter

    def timed(name: str, work: Callable[[], Tensor]) -> float:
        start = clock()
        found[name] = work()
        wait_for(world.device)
        return clock() - start

    def ours(plan: Plan, checks: bool = False) -> Tensor:
        outcome: Outcome = run_plan(network, batches, plan, world=world)
        if checks:
            self_checks(network, batches, outcome, world=world)
        return outcome.code_CM == ROBUST

    runs = {"plain": lambda: timed("plain", lambda: plain_loop(network, plain_batches, plans["ours"]))}
    runs |= {name: lambda n=name, p=plan: timed(n, lambda: ours(p)) for name, plan in plans.items()}
    if args.checks:
        runs["checks"] = lambda: timed("checks", lambda: ours(plans["ours"], checks=True))
    seconds = in_turns(runs, args.rounds)
    rows = [_row(name, seconds[name], seconds["plain"], found[name], found["plain"]) for name in runs]
    about = {"model": config.model.name, "dataset": data.name, "test_images": sum(len(b.label_N) for b in batches)}
    about |= {"attack": attack.name, "plain_batch_size": args.batch_size, "batch_size": BATCH_SIZE}
    about |= {"rounds": args.rounds, "clock": "processor" if clock is time.process_time else "wall"}
    conditions = about | environment(world.device)
    text = f"{markdown(rows)}\n\n{describe(conditions)}"
    print(text)
    save([row | conditions for row in rows], RESULTS / f"evaluation_{config.model.name}.csv")
    if args.docs:
        put_into_docs(f"evaluation {config.model.name}", text)


if __name__ == "__main__":
    main(sys.argv[1:])
