"""What does it matter that our attack sees the running statistics of the step before?

    python benchmarks/attack_order.py [--epochs 10] [--seed 0]

The published order runs the clean forward first, so its attack sees running statistics already moved by the clean
images of the batch; ours attacks first. Trains the digits configuration, at every step attacks the images both ways,
and prints how the adversarial images and their robust loss (in the forward that is trained on) differ.
"""

import argparse
import copy
import statistics

import torch
import torch.nn.functional as F

from oat_dist.conditioning import LambdaSampler
from oat_dist.config_io import load_config
from oat_dist.data import TrainLoader, prepare
from oat_dist.models import build_model
from oat_dist.optim import build_optimizer, learning_rate
from oat_dist.step import attack_images, training_losses

CPU = torch.device("cpu")


def main() -> None:
    """Train, compare at every step, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", default="data", help="folder of the prepared data sets")
    args = parser.parse_args()
    config = load_config(
        ["--config", "launch/configs/digits.yaml", "--data.loader=memory", f"--seed={args.seed}"],
        overrides={"optim.epochs": args.epochs},
    )
    data = prepare(args.root, "digits")
    loader = TrainLoader(data, config, rank=0, ranks=1, device=CPU)
    sampler = LambdaSampler(config.conditioning, seed=args.seed, batch_size=128, steps_per_epoch=loader.steps_per_epoch)
    network = build_model(config, in_channels=1, num_classes=10)
    optimizer = build_optimizer(network, config.optim)
    total = args.epochs * loader.steps_per_epoch
    ratios, moved, step = [], [], 0
    for epoch in range(args.epochs):
        for step_in_epoch, (batch,) in enumerate(loader.epoch(epoch)):
            lam_N = sampler.draw(epoch, step_in_epoch, batch.position_N, batch.index_N)
            before = copy.deepcopy(network)
            after = copy.deepcopy(network)
            with torch.no_grad():
                after(batch.image_NCHW, after.condition(lam_N))  # the clean forward moves the running statistics
            ours, theirs = (adversarial(net, batch, lam_N, config, epoch) for net in (before, after))
            ratios.append(robust_loss(network, batch, ours, lam_N) / robust_loss(network, batch, theirs, lam_N))
            moved.append((ours - theirs).abs().gt(1e-6).float().mean().item())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step, total)
            optimizer.zero_grad()
            training_losses(network, batch, lam_N, config=config, epoch=epoch, forward=network).loss_N.mean().backward()
            optimizer.step()
            step += 1
    print(f"steps: {step}")
    for name, part in (
        ("first epoch", slice(0, loader.steps_per_epoch)),
        ("after it", slice(loader.steps_per_epoch, None)),
    ):
        low, middle, high = min(ratios[part]), statistics.median(ratios[part]), max(ratios[part])
        print(f"{name}: robust loss, ours / published order: median {middle:.4f} ({low:.4f} to {high:.4f})")
        print(f"{name}: share of pixels that differ: median {statistics.median(moved[part]):.3f}")


def adversarial(network, batch, lam_N, config, epoch):
    """Adversarial images of those with lambda > 0."""
    cond = network.condition(lam_N)
    attacked = slice(cond.num_zero, None)
    frozen = network.freeze(cond.attacked())
    return attack_images(
        network, frozen, batch.image_NCHW[attacked], batch.label_N[attacked], batch.index_N[attacked],
        config=config, epoch=epoch,
    )  # fmt: skip


@torch.no_grad()
def robust_loss(network, batch, x_adv, lam_N) -> float:
    """Mean cross-entropy of adversarial images in a joint training forward of a copy."""
    twin = copy.deepcopy(network)
    cond = twin.condition(lam_N)
    logits = twin(torch.cat((batch.image_NCHW, x_adv)), cond.joint())[len(batch.label_N) :]
    return F.cross_entropy(logits, batch.label_N[cond.num_zero :]).item()


if __name__ == "__main__":
    main()
