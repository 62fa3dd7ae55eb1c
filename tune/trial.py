"""What one trial does, on every rank of it: train a network by the ordinary trainer, measure it, report. Knows no Ray.

A job is a plain dictionary, so that it can travel:

    {"kind": "dedicated", "lam": 0.1, "seed": 0, "split": "val", "run": None}         a dedicated network, cached
    {"kind": "search", "sample": {...}, "folder": "trials"}                           a candidate, measured on the way
    {"kind": "report", "sample": {...}, "folder": "report", "seed": 0, "split": "test", "lambdas": [...]}

Everything is idempotent: a job that was killed goes on from its checkpoint, and one that was finished reads its result.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence

from oat_dist.config import Config
from oat_dist.config_io import with_settings
from oat_dist.data import PreparedData, evaluation_batches
from oat_dist.dedicated import dedicated_config, find_trained, measure_run
from oat_dist.distributed import World
from oat_dist.evaluation import EvaluationAttack, evaluate
from oat_dist.frontier import frontier_ratio, of_width
from oat_dist.models.network import ConditionalNetwork
from oat_dist.trainer import open_data, train
from tune.space import settings

Report = Callable[[dict], None]


def run_job(
    job: dict, base: Config, *, dedicated: Sequence[dict], interval_epochs: int, world: World, report: Report
) -> None:
    """Do a job; every rank calls, and `report` is called on every rank with the same values.

    Args:
        job: As described above.
        base: The run that trials start from; its paths are absolute.
        dedicated: Mean points of the dedicated networks on validation; empty for a dedicated job.
        interval_epochs: Epochs between two reports of a search job.
        world: The ranks.
        report: Takes metrics; the last ones count. It may end the process.
    """
    data = world.on_main(lambda: open_data(base))
    start = time.perf_counter()
    if job["kind"] == "search":
        _run_candidate(job, base, data, dedicated, interval_epochs, world=world, report=report)
        return
    if job["kind"] == "dedicated":
        config, lambdas = dedicated_config(base, job["lam"], job["seed"]), [job["lam"]]
    else:
        config, lambdas = dataclasses.replace(job_config(job, base), seed=job["seed"]), job["lambdas"]
    there = pathlib.Path(job["run"]) if job.get("run") else world.on_main(lambda: find_trained(config, data))
    run = there or train(config, world)
    points = measure_run(run, lambdas, EvaluationAttack.of(base), data=data, split=job["split"], world=world)
    report({"points": points, "run": str(run), "seconds": round(time.perf_counter() - start, 2)})


def job_config(job: dict, base: Config) -> Config:
    """The training run of a search or report job."""
    config = with_settings(base, settings(job["sample"]))
    return dataclasses.replace(config, output_dir=job["folder"], name=f"{base.name}-trial")


def summary(points: Sequence[dict], dedicated: Sequence[dict]) -> dict[str, float]:
    """The objectives of points at the frontier's lambdas."""
    return {
        "ratio": frontier_ratio(points, dedicated),
        "sa_mean": sum(point["sa"] for point in points) / len(points),
        "ra_mean": sum(point["ra"] for point in points) / len(points),
    }


def _run_candidate(
    job: dict, base: Config, data: PreparedData, dedicated: Sequence[dict], interval_epochs: int, *, world: World,
    report: Report,
) -> None:  # fmt: skip
    config = job_config(job, base)
    attack, cfg = EvaluationAttack.of(config), config.evaluation
    batches = evaluation_batches(data, cfg.split, config.data, cfg.batch_size, device=world.device)
    images_per_epoch = config.steps_per_epoch(data.counts["train"]) * config.optim.batch_size
    clock = _Clock()

    def tell(epoch: int, points: list[dict], run: pathlib.Path | None) -> None:
        rate = clock.epochs * images_per_epoch / clock.training_s if clock.epochs else None
        values = {"epoch": epoch, **summary(points, dedicated), "points": points, "run": str(run) if run else None}
        report({**values, "seconds": round(clock.seconds, 2), "images_per_s": rate and round(rate, 1)})

    def after_epoch(epoch: int, network: ConditionalNetwork) -> None:
        clock.end_epoch()
        if epoch % interval_epochs == 0 and epoch < config.optim.epochs:
            points = evaluate(network, batches, cfg.lambdas, attack, seed=config.seed, world=world)
            tell(epoch, points, None)
        clock.start_epoch()

    run = world.on_main(lambda: _same_before(config, data)) or train(config, world, after_epoch)
    points = of_width(world.on_main(lambda: json.loads((run / "frontier.json").read_text())["points"]))
    tell(config.optim.epochs, points, run)


def _same_before(config: Config, data: PreparedData) -> pathlib.Path | None:
    """A finished run of the same settings, of this trial or of another: a sampler may suggest a sample again."""
    siblings = sorted(pathlib.Path(config.output_dir).parent.glob("*"))
    found = (find_trained(dataclasses.replace(config, output_dir=str(folder)), data) for folder in siblings)
    return next((run for run in found if run is not None), None)


class _Clock:
    """Seconds of a trial, and of them those spent training in this process."""

    def __init__(self) -> None:
        self._start = self._epoch_start = time.perf_counter()
        self.epochs, self.training_s = 0, 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def start_epoch(self) -> None:
        self._epoch_start = time.perf_counter()

    def end_epoch(self) -> None:
        self.training_s += time.perf_counter() - self._epoch_start
        self.epochs += 1
