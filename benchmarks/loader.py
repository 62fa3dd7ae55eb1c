"""How many images per second do the loaders deliver?

    python benchmarks/loader.py                                       random 32x32x3 images in a temporary folder
    python benchmarks/loader.py --root data --dataset cifar10 --rounds 5

Times whole epochs of `TrainLoader` - reading, augmentation, conversion to floats - with each reader, with and without
augmentation. The four take turns, so that their ratios hold on a machine whose speed drifts; torch has one thread, FFCV
one worker. "Per core" divides by the processor time of all threads of the process, which counts FFCV's worker too.
Prints a table and writes benchmarks/results/loader.csv.
"""

import argparse
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

import numpy as np
import torch
from table import RESULTS, save

from oat_dist.config import Config, DataConfig, OptimConfig
from oat_dist.data import PreparedData, TrainLoader, open_prepared, prepare
from oat_dist.data.ffcv_io import is_installed

AUGMENTATIONS = {"pad-4 crop + flip": {"shift_pixels": 4, "flip": True}, "none": {"shift_pixels": 0, "flip": False}}


def random_set(root: str, num_images: int) -> PreparedData:
    """Prepare random 32x32x3 images: `num_images` for training."""
    draw = np.random.default_rng(0)
    num = num_images + 20
    arrays = {"x": draw.integers(0, 256, (num, 32, 32, 3), dtype=np.uint8), "y": np.arange(num) % 10}
    ends = {"val": slice(0, 10), "test": slice(10, 20), "train": slice(20, None)}
    path = pathlib.Path(root) / "random.npz"
    np.savez(path, **{f"{key}_{part}": a[rows] for part, rows in ends.items() for key, a in arrays.items()})
    return prepare(root, f"npz:{path}")


def epoch_timer(data: PreparedData, config: Config) -> Callable[[int], tuple[int, float, float]]:
    """A function that runs an epoch and gives its number of images, seconds and processor seconds."""
    loader = TrainLoader(data, config, rank=0, ranks=1, device=torch.device("cpu"))

    def run(epoch: int) -> tuple[int, float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        images = sum(len(batch.label_N) for batches in loader.epoch(epoch) for batch in batches)
        return images, time.perf_counter() - wall, time.process_time() - processor

    return run


def measure(data: PreparedData, rounds: int, batch_size: int) -> list[dict]:
    """One row per reader and augmentation."""
    timers = {}
    for reader in ["ffcv", "memory"] if is_installed() else ["memory"]:
        for name, settings in AUGMENTATIONS.items():
            cfg = DataConfig(loader=reader, workers=1, **settings)
            timers[reader, name] = epoch_timer(data, Config(data=cfg, optim=OptimConfig(batch_size=batch_size)))
    times = {key: [] for key in timers}
    for epoch in range(rounds + 1):
        for key, run in timers.items():
            result = run(epoch)
            # The first epoch compiles FFCV's reader.
            if epoch:
                times[key].append(result)
    return [
        {
            "reader": reader,
            "augmentation": augmentation,
            "images_per_s": round(statistics.median(n / wall for n, wall, _ in runs)),
            "images_per_s_per_core": round(statistics.median(n / processor for n, _, processor in runs)),
            "slowest": round(min(n / wall for n, wall, _ in runs)),
            "fastest": round(max(n / wall for n, wall, _ in runs)),
        }
        for (reader, augmentation), runs in times.items()
    ]


def main() -> None:
    """Measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder of the prepared data sets")
    parser.add_argument("--dataset", help="a prepared data set; default: random images")
    parser.add_argument("--images", type=int, default=20_000, help="random images of an epoch")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="timed epochs of each, after one that is not timed")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "loader.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = open_prepared(args.root, args.dataset) if args.dataset else random_set(folder, args.images)
        rows = measure(data, args.rounds, args.batch_size)
    common = {
        "dataset": data.name,
        "image": "x".join(map(str, data.image_shape)),
        "images": data.counts["train"],
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "device": f"{platform.machine()} CPU, 1 torch thread, 1 FFCV worker",
        "torch": torch.__version__,
        "ffcv": metadata.version("ffcv") if is_installed() else "",
        "numpy": np.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in common.items()))
    for row in rows:
        print(f"{row['reader']:8} {row['augmentation']:18} {row['images_per_s']:>9,} images/s "
              f"({row['slowest']:,} to {row['fastest']:,}), {row['images_per_s_per_core']:>9,} per core")  # fmt: skip
    save([row | common for row in rows], args.out)


if __name__ == "__main__":
    main()
