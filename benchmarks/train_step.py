"""How fast is a training step against the published arrangement, in one run?

    python benchmarks/train_step.py [--model resnet8] [--batch-size 128] [--rounds 7]

Both arrangements do the same work - PGD-7, losses, backward, SGD - in float32 and take turns, so the ratio holds on a
machine whose speed drifts. Ours conditions once per step, attacks the frozen network and makes one joint forward; the
published one (`published_step.py`) runs the FiLM networks on every row in every forward and makes three calls. Prints
a table and writes benchmarks/results/train_step_<model>.csv.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from published_step import published, three_call_step
from table import RESULTS, save

from oat_dist.attacks import evaluation_mode, pgd
from oat_dist.config import Config, ModelConfig
from oat_dist.data import Batch
from oat_dist.models import MODELS, build_model
from oat_dist.step import training_losses

SHAPES = {"resnet8": (1, 8, 8), "wrn10_2": (3, 32, 32)}


def make_batch(shape: tuple[int, ...], batch_size: int) -> tuple[Batch, torch.Tensor]:
    """Random images, and lambdas as the paper draws them: one sixth 0, those first."""
    gen = torch.Generator().manual_seed(0)
    choices = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 1.0], dtype=torch.float64)
    batch = Batch(
        image_NCHW=torch.rand(batch_size, *shape, generator=gen).contiguous(memory_format=torch.channels_last),
        label_N=torch.randint(10, (batch_size,), generator=gen),
        index_N=torch.arange(batch_size),
        position_N=torch.arange(batch_size),
    )
    return batch, choices.repeat_interleave(-(-batch_size // 6))[:batch_size]


def our_step(config: Config, shape: tuple[int, ...], batch_size: int) -> Callable[[], float]:
    """A function that takes one step of ours and gives the loss."""
    network = build_model(config, in_channels=shape[0], num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    batch, lam_N = make_batch(shape, batch_size)

    def step() -> float:
        optimizer.zero_grad()
        loss = training_losses(network, batch, lam_N, config=config, epoch=0, forward=network).loss_N.mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def published_step(config: Config, shape: tuple[int, ...], batch_size: int) -> Callable[[], float]:
    """A function that takes one published step and gives the loss."""
    network = build_model(config, in_channels=shape[0], num_classes=10)
    twin = published(network)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    batch, lam_N = make_batch(shape, batch_size)
    code_NE = network.encoder.codes_KE[network.encoder.rows(lam_N)[1]]
    attacked = lam_N > 0
    told = (code_NE[attacked], ~attacked[attacked])
    x, label, weight = batch.image_NCHW.contiguous(), batch.label_N, lam_N.float()

    def step() -> float:
        optimizer.zero_grad()
        with evaluation_mode(twin):
            x_adv = pgd(lambda images: twin(images, told), x[attacked], label[attacked], eps=config.attack.eps, steps=7)
        loss = three_call_step(twin, code_NE, x, x_adv, label, weight)
        optimizer.step()
        return loss.mean().item()

    return step


def main() -> None:
    """Measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet8")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each, after one that is not timed")
    args = parser.parse_args()
    config = Config(model=ModelConfig(name=args.model))
    shape = SHAPES[args.model]
    steps = {"ours": our_step, "published": published_step}
    run = {name: make(config, shape, args.batch_size) for name, make in steps.items()}
    seconds = {name: [] for name in run}
    for round_number in range(args.rounds + 1):
        for name, step in run.items():
            start = time.perf_counter()
            step()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["published"], strict=True))
    row = {
        "model": args.model,
        "image": "x".join(map(str, shape)),
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        **{f"{name}_images_per_s": round(args.batch_size / statistics.median(s), 1) for name, s in seconds.items()},
        "speedup_median": round(statistics.median(ratios), 2),
        "speedup_min": round(ratios[0], 2),
        "speedup_max": round(ratios[-1], 2),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, fp32",
        "torch": torch.__version__,
    }
    for key, value in row.items():
        print(f"{key:24} {value}")
    save([row], RESULTS / f"train_step_{args.model}.csv")


if __name__ == "__main__":
    main()
