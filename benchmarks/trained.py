"""Runs of a benchmark: found again by their fingerprint, trained where they are missing."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from oat_dist.config import Config
from oat_dist.data import PreparedData
from oat_dist.dedicated import dedicated_config, find_trained, measure_run
from oat_dist.distributed import World
from oat_dist.evaluation import EvaluationAttack
from oat_dist.runs import load_run
from oat_dist.trainer import train


def trained(config: Config, data: PreparedData, world: World) -> pathlib.Path:
    """Folder of a finished run of a configuration, in its output_dir.

    A run that measures itself on validation sees nothing of test; one that was there and measured itself on test is the
    same network.
    """
    for split in (config.evaluation.split, "test"):
        measured = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, split=split))
        if run := find_trained(measured, data):
            return run
    return train(config, world)


def training_seconds(run: pathlib.Path) -> float:
    """Seconds that the training steps of a run took, all interruptions left out; the clock starts anew after each."""
    elapsed = [json.loads(line)["elapsed_s"] for line in (run / "timings.jsonl").read_text().splitlines()]
    return round(sum(now for now, after in zip(elapsed, [*elapsed[1:], 0.0], strict=True) if after < now), 1)


def images_per_s(run: pathlib.Path) -> float:
    """Training images per second of a run, its steps weighed by their time."""
    step = json.loads((run / "timings.jsonl").read_text().splitlines()[-1])["step"]
    config: Config = load_run(run)[0]
    return round(step * config.optim.batch_size / training_seconds(run), 1)


def num_parameters(run: pathlib.Path) -> int:
    """Trained numbers of a run's network."""
    return sum(parameter.numel() for parameter in load_run(run)[1].parameters())


def dedicated_points(
    config: Config, lambdas: Sequence[float], data: PreparedData, world: World, split: str = "test"
) -> list[dict]:
    """Points on a split of the dedicated networks of a configuration's seed and recipe."""
    points, attack = [], EvaluationAttack.of(config)
    for lam in lambdas:
        run = trained(dedicated_config(config, lam, config.seed), data, world)
        points += measure_run(run, [lam], attack, data=data, split=split, world=world)
    return points
