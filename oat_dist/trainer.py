"""Training from a configuration to a run folder: file -> loader -> condition -> attack -> forward -> loss -> engine."""

import pathlib

import torch
from torch import Tensor

from oat_dist import data as data_sets
from oat_dist import report, runs
from oat_dist.conditioning import LambdaSampler
from oat_dist.config import Config
from oat_dist.data import PreparedData, TrainLoader
from oat_dist.data.sources import SOURCES
from oat_dist.distributed import World
from oat_dist.engine import Engine, deepspeed_config
from oat_dist.evaluation import EvaluationAttack
from oat_dist.metrics import MetricsWriter
from oat_dist.models import build_model
from oat_dist.models.network import ConditionalNetwork
from oat_dist.optim import AveragedNetwork, learning_rate
from oat_dist.progress import progress_bar
from oat_dist.step import training_losses


def train(config: Config, world: World) -> pathlib.Path:
    """Train one network and measure its curve.

    Args:
        config: Everything about the run.
        world: The ranks, from `oat_dist.engine.init_world`.

    Returns:
        The run folder.

    Raises:
        UserError: The configuration asks for something that is not there or cannot be.
    """
    data = world.on_main(lambda: open_data(config))
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    run = world.on_main(lambda: runs.create_run(config, data, deepspeed_config(config, world.ranks), world.ranks))
    network = build_model(config, in_channels=data.image_shape[2], num_classes=len(data.classes)).to(world.device)
    engine = Engine(network, config, world)
    averaged = AveragedNetwork(network, config.optim.ema_decay) if config.optim.ema_decay else None

    fit(network, engine, loader, averaged, config=config, world=world, run=run)

    world.average_running_statistics([network] + ([averaged.network] if averaged else []))
    final = averaged.network if averaged else network
    if world.is_main:
        runs.save_model(final, data, run / "model.safetensors")
    cfg, stem = config.evaluation, run / "frontier"
    attack = EvaluationAttack(norm=config.attack.norm, eps=config.attack.eps, steps=cfg.steps, restarts=cfg.restarts)
    report.measure(
        final,
        data,
        attack,
        cfg.lambdas,
        config=config,
        split=cfg.split,
        batch_size=cfg.batch_size,
        world=world,
        stem=stem,
    )
    return run


def open_data(config: Config) -> PreparedData:
    """The data set of a configuration; one that comes with the installation is prepared on first use.

    Raises:
        UserError: It is not there, or lacks what the run needs.
    """
    name, root = config.data.dataset, config.data.root
    if name in SOURCES and not (pathlib.Path(root) / name / "dataset.json").exists():
        data = data_sets.prepare(root, name)
    else:
        data = data_sets.open_prepared(root, name)
    data.file("train", config.data.loader)
    data.file(config.evaluation.split, config.data.loader)
    return data


def fit(
    network: ConditionalNetwork,
    engine: Engine,
    loader: TrainLoader,
    averaged: AveragedNetwork | None,
    *,
    config: Config,
    world: World,
    run: pathlib.Path,
) -> None:
    """Run all steps; the host waits for the device on log steps alone."""
    sampler = LambdaSampler(
        config.conditioning,
        seed=config.seed,
        batch_size=config.optim.batch_size,
        steps_per_epoch=loader.steps_per_epoch,
    )
    total_steps = config.optim.epochs * loader.steps_per_epoch
    log = _Log(world)
    with (
        MetricsWriter(run if world.is_main else None, tensorboard=config.logging.tensorboard) as metrics,
        progress_bar("training", total_steps, is_main=world.is_main) as advance,
    ):
        step = 0
        for epoch in range(config.optim.epochs):
            for step_in_epoch, micro_batches in enumerate(loader.epoch(epoch)):
                lr = learning_rate(config.optim, step, total_steps)
                for batch in micro_batches:
                    lam_N = sampler.draw(epoch, step_in_epoch, batch.position_N, batch.index_N)
                    losses = training_losses(network, batch, lam_N, config=config, epoch=epoch, forward=engine.forward)
                    engine.backward_and_step(losses.loss_N, lr)
                    log.add(losses.counts, clean=len(lam_N), attacked=int((lam_N > 0).sum()))
                if averaged is not None:
                    averaged.update(step)
                step += 1
                if step % config.logging.interval_steps == 0 or step == total_steps:
                    values, images = log.flush()
                    metrics.write(step, {"epoch": epoch, "lr": lr, **values}, images=images)
                    advance(f"epoch {epoch + 1}, loss {values['loss']:.3f}")
                else:
                    advance()


class _Log:
    """Sums counts on the device between two log steps and turns them into means over all ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._clean = self._attacked = 0

    def add(self, counts: dict[str, Tensor], *, clean: int, attacked: int) -> None:
        for name, value in counts.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()
        self._clean += clean
        self._attacked += attacked

    def flush(self) -> tuple[dict[str, float], int]:
        """Means since the last call, and the number of images; the one place where the host waits."""
        numbers = torch.tensor([self._clean, self._attacked], dtype=torch.float64, device=self.world.device)
        totals = self.world.sum(torch.cat((torch.stack(list(self._sums.values())), numbers))).tolist()
        *sums, clean, attacked = totals
        values = {}
        for name, total in zip(self._sums, sums, strict=True):
            number = attacked if name.endswith("robust") else clean
            values[name.replace("correct", "accuracy")] = total / number if number else 0.0
        self._reset()
        return values, int(clean)
