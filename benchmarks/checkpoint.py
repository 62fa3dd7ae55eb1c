"""What does a checkpoint cost?

    python benchmarks/checkpoint.py [--model resnet34] [--batch-size 16] [--steps 3]

Builds the network with momentum and averaged weights, times training steps, then saves checkpoints as training does:
the time that training is held up (copying to host memory) and the time of the whole write, which goes on in the
background. Prints the share of an epoch of 45,000 images (one checkpoint per epoch is the default) and writes
benchmarks/results/checkpoint_<model>.csv.
"""

import argparse
import pathlib
import platform
import statistics
import tempfile
import time

import torch
from table import RESULTS, save
from train_step import make_batch

from oat_dist.checkpoint import CheckpointStore
from oat_dist.config import Config, ModelConfig
from oat_dist.models import MODELS, build_model
from oat_dist.optim import AveragedNetwork
from oat_dist.step import training_losses

EPOCH_IMAGES = 45_000


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet34")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="timed training steps, after one that is not timed")
    parser.add_argument("--saves", type=int, default=3)
    args = parser.parse_args()
    config = Config(model=ModelConfig(name=args.model))
    network = build_model(config, in_channels=3, num_classes=10)
    averaged = AveragedNetwork(network, 0.99)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    batch, lam_N = make_batch((3, 32, 32), args.batch_size)
    step_s = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        training_losses(network, batch, lam_N, config=config, epoch=0, forward=network).loss_N.mean().backward()
        optimizer.step()
        step_s.append(time.perf_counter() - start)
    momentum = {f"{n}/momentum_buffer": optimizer.state[p]["momentum_buffer"] for n, p in network.named_parameters()}
    parts = {"network": network.state_dict(), "averaged": averaged.network.state_dict(), "optimizer": momentum}
    held_s, whole_s = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(pathlib.Path(folder), keep=2)
        for step in range(args.saves):
            start = time.perf_counter()
            store.save({"step": step}, parts)
            held_s.append(time.perf_counter() - start)
            store.wait()
            whole_s.append(time.perf_counter() - start)
    images_per_s = args.batch_size / statistics.median(step_s[1:])
    epoch_s = EPOCH_IMAGES / images_per_s
    row = {
        "model": args.model,
        "mib": round(sum(t.nbytes for part in parts.values() for t in part.values()) / 2**20, 1),
        "held_up_s": round(statistics.median(held_s), 3),
        "whole_write_s": round(statistics.median(whole_s), 3),
        "images_per_s": round(images_per_s, 2),
        "held_up_share_of_epoch_percent": round(100 * statistics.median(held_s) / epoch_s, 4),
        "whole_share_of_epoch_percent": round(100 * statistics.median(whole_s) / epoch_s, 4),
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads, fp32",
        "torch": torch.__version__,
    }
    for key, value in row.items():
        print(f"{key:32} {value}")
    save([row], RESULTS / f"checkpoint_{args.model}.csv")


if __name__ == "__main__":
    main()
