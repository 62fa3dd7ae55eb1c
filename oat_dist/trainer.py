"""Training from a configuration to a run folder: file -> loader -> condition -> attack -> forward -> loss -> engine."""

import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from oat_dist import data as data_sets
from oat_dist import report, runs
from oat_dist.checkpoint import Checkpoint, CheckpointStore
from oat_dist.compilation import require_compiler
from oat_dist.conditioning import LambdaSampler
from oat_dist.config import Config, to_dict
from oat_dist.data import PreparedData, TrainLoader
from oat_dist.data.sources import SOURCES
from oat_dist.distributed import World
from oat_dist.divergence import LossWatch, require_finite
from oat_dist.engine import Engine, deepspeed_config
from oat_dist.evaluation import EvaluationAttack
from oat_dist.graphed import graph_replay
from oat_dist.losses import robust_term
from oat_dist.metrics import MetricsWriter, keep_metrics_until
from oat_dist.models import build_model, model_channels
from oat_dist.models.init_from import initialise_from
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.slimming import idle_parameters, widths_of_step
from oat_dist.optim import AveragedNetwork, learning_rate
from oat_dist.progress import progress_bar
from oat_dist.resume import RunLock, find_unfinished
from oat_dist.step import training_losses
from oat_dist.step_log import WidthLogs
from oat_dist.validation import Validator
from oat_dist.weights import load_exactly

AfterEpoch = Callable[[int, ConditionalNetwork], None]
"""(epochs done, the network that would be evaluated): called on every rank, after the epoch's checkpoint."""


def train(config: Config, world: World, after_epoch: AfterEpoch | None = None) -> pathlib.Path:
    """Train one network and measure its curve, or go on with an unfinished run of the same settings.

    Args:
        config: Everything about the run.
        world: The ranks, from `oat_dist.engine.init_world`; they may have trained other runs before.
        after_epoch: Called after every epoch; what it raises ends the training, which can be gone on with.

    Returns:
        The run folder.

    Raises:
        UserError: The configuration asks for something that is not there or cannot be.
        NonFiniteError: A loss or a weight stopped being finite; on every rank.
    """
    robust_term(config)
    model_channels(config.model)
    if config.engine.compile:
        require_compiler(world.device)
    data = world.on_main(lambda: open_data(config))
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    lock = RunLock()
    run, checkpoint = world.on_main(lambda: _open_run(config, data, world, lock))
    try:
        training = Training(config, data, loader, world=world, run=run, checkpoint=checkpoint)
        training.fit(after_epoch)
        cfg = config.evaluation
        report.measure(
            training.finish(),
            data,
            EvaluationAttack.of(config),
            cfg.lambdas,
            config=config,
            split=cfg.split,
            batch_size=cfg.batch_size,
            world=world,
            stem=run / "frontier",
        )
    finally:
        lock.release()
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
    splits = {"train", config.evaluation.split} | ({"val"} if config.evaluation.interval_epochs else set())
    for split in sorted(splits):
        data.file(split, config.data.loader)
    return data


def _open_run(
    config: Config, data: PreparedData, world: World, lock: RunLock
) -> tuple[pathlib.Path, Checkpoint | None]:
    """On the main rank: the locked folder of a new run, or of an unfinished one with its newest checkpoint."""
    run = find_unfinished(config)
    if run is None:
        run = runs.create_run(config, data, deepspeed_config(config, world.ranks), world.ranks)
        lock.take(run)
        return run, None
    lock.take(run)
    checkpoint = CheckpointStore(run / "checkpoints", keep=config.checkpoint.keep).newest()
    step = checkpoint.step if checkpoint else 0
    keep_metrics_until(run, step)
    runs.note_resume(run, step, world.ranks)
    print(f"going on with {run} at step {step}")
    return run, checkpoint


def starting_network(config: Config, data: PreparedData, checkpoint: Checkpoint | None) -> ConditionalNetwork:
    """The network that training begins with: of a checkpoint, else from `model.init_from`, else fresh.

    Args:
        config: Everything about the run.
        data: Its data set, which gives channels, classes and pixel statistics.
        checkpoint: Where to go on, or None.

    Returns:
        The network on the CPU.

    Raises:
        UserError: The weights do not fit.
    """
    network = build_model(
        config,
        in_channels=data.image_shape[2],
        num_classes=len(data.classes),
        pixel_mean=data.pixel_mean,
        pixel_std=data.pixel_std,
    )
    if checkpoint is not None:
        load_exactly(network, checkpoint.tensors("network"), checkpoint.folder / "network.safetensors")
    elif config.model.init_from is not None:
        initialise_from(network, config.model.init_from)
    return network


class Training:
    """One run while it goes on."""

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        loader: TrainLoader,
        *,
        world: World,
        run: pathlib.Path,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Build network, engine and average, at their start or where a checkpoint left them.

        Args:
            config: Everything about the run.
            data: Its data set.
            loader: Training batches of this rank.
            world: The ranks.
            run: Folder of the run.
            checkpoint: Where to go on, or None.
        """
        self.config, self.data, self.loader, self.world, self.run = config, data, loader, world, run
        self.network = starting_network(config, data, checkpoint).to(world.device)
        # Weights first: DeepSpeed takes its own copies of them. Its optimiser state exists only afterwards.
        self.engine = Engine(self.network, config, world)
        self.averaged = AveragedNetwork(self.network, config.optim.ema_decay) if config.optim.ema_decay else None
        self.store = CheckpointStore(run / "checkpoints", keep=config.checkpoint.keep)
        widths = config.model.widths
        self.replay = graph_replay(
            config.engine.cuda_graph, world.device, name="attack", most_shapes=8 * len(widths)
        )  # fmt: skip
        self.log, self.watch = WidthLogs(widths, world), LossWatch(world)
        self.idle = {width: tuple(idle_parameters(self.network, width)) for width in widths}
        self.validator = Validator(config, data, world=world, run=run) if config.evaluation.interval_epochs else None
        self.step = 0
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def best_so_far(self) -> torch.nn.Module:
        """The network that is evaluated: the average where there is one."""
        return self.averaged.network if self.averaged else self.network

    def fit(self, after_epoch: AfterEpoch | None = None) -> None:
        """Run all steps that are left; the host waits for the device on log steps and at checkpoints alone.

        Raises:
            UserError: The loss is no longer finite.
        """
        config, world, loader = self.config, self.world, self.loader
        sampler = LambdaSampler(
            config.conditioning,
            seed=config.seed,
            batch_size=config.optim.batch_size,
            steps_per_epoch=loader.steps_per_epoch,
        )
        total = config.optim.epochs * loader.steps_per_epoch
        with (
            MetricsWriter(self.run if world.is_main else None, tensorboard=config.logging.tensorboard) as metrics,
            progress_bar("training", total, is_main=world.is_main, done=self.step) as advance,
        ):
            first_epoch, first_step = divmod(self.step, loader.steps_per_epoch)
            for epoch in range(first_epoch, config.optim.epochs):
                for at, micro_batches in enumerate(loader.epoch(epoch, first_step), start=first_step):
                    self._take_step(sampler, micro_batches, epoch, at, learning_rate(config.optim, self.step, total))
                    if self.step % config.logging.interval_steps == 0 or self.step == total:
                        self.watch.check(self._last_good)
                        lr = learning_rate(config.optim, self.step - 1, total)
                        values, images = self.log.flush()
                        metrics.write(self.step, {"epoch": epoch, "lr": lr, **values}, images=images)
                        advance(f"epoch {epoch + 1}, loss {values['loss']:.3f}")
                    else:
                        advance()
                first_step = 0
                self._end_epoch(epoch, metrics)
                if after_epoch is not None:
                    self._average_statistics()
                    self.watch.check(self._last_good)
                    after_epoch(epoch + 1, self.best_so_far)
        self.store.wait()

    def finish(self) -> torch.nn.Module:
        """Write model.safetensors - the best network by validation score, or the last - and return it."""
        final = self.best_so_far
        if self.validator is not None:
            self.validator.load_best(final)
        self._require_finite({"model": final.state_dict()})
        if self.world.is_main:
            runs.save_model(final, self.data, self.run / "model.safetensors")
        return final

    def _take_step(self, sampler: LambdaSampler, micro_batches: list, epoch: int, at: int, lr: float) -> None:
        """One optimiser step: condition, attack, forward, loss, backward for every micro-batch and width."""
        for batch in micro_batches:
            lam_N, teacher = sampler.draw(epoch, at, batch.position_N, batch.index_N), None
            for width in widths_of_step(self.config.model, self.config.seed, self.step):
                losses = training_losses(
                    self.network, batch, lam_N, config=self.config, epoch=epoch, forward=self.engine.forward,
                    replay=self.replay, step=at, width=width, teacher=teacher,
                )  # fmt: skip
                self.engine.backward_and_step(losses.loss_N, lr, self.idle[width])
                self.watch.add(self.step + 1, losses.loss_N, lam_N)
                numbers = {"images": len(lam_N), "clean": losses.num_clean, "robust": int((lam_N > 0).sum())}
                self.log.add(width, losses.counts, **numbers)
                if self.config.loss.distill_widths and width == 1:
                    teacher = losses
        if self.averaged is not None:
            self.averaged.update(self.step)
        self.step += 1

    def _end_epoch(self, epoch: int, metrics: MetricsWriter) -> None:
        """Validate and checkpoint where it is time."""
        done, is_last = epoch + 1, epoch + 1 == self.config.optim.epochs
        validates = self.validator is not None and (done % self.config.evaluation.interval_epochs == 0 or is_last)
        saves = done % self.config.checkpoint.interval_epochs == 0 or is_last
        if validates or saves:
            self._average_statistics()
            self.watch.check(self._last_good)
            self._require_finite(self._networks())
        if validates:
            metrics.write(self.step, self.validator.measure(self.best_so_far, self.step))
        if saves:
            self._save()

    def _average_statistics(self) -> None:
        self.world.average_running_statistics([self.network] + ([self.averaged.network] if self.averaged else []))

    def _save(self) -> None:
        """Hand everything to the checkpoint store; every rank takes part in gathering."""
        state = {"step": self.step, "log": self.log.collapse(), "config": to_dict(self.config)}
        optimizer = {"optimizer": self.engine.optimizer_state()}
        self._require_finite(optimizer)
        if self.world.is_main:
            self.store.save(state, self._networks() | optimizer)

    def _networks(self) -> dict[str, dict[str, Tensor]]:
        """States of the trained network and, where there is one, of the average."""
        networks = {"network": self.network, "averaged": self.averaged and self.averaged.network}
        return {name: network.state_dict() for name, network in networks.items() if network is not None}

    def _require_finite(self, parts: dict[str, dict[str, Tensor]]) -> None:
        """Nothing that is not finite is written."""
        require_finite(parts, self.step, world=self.world, last_good=self._last_good)

    def _last_good(self) -> Checkpoint | None:
        """On the main rank: the newest checkpoint, after the one being written."""
        self.store.wait()
        return self.store.newest()

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Everything but the weights, which had to be there before the engine."""
        self.step = checkpoint.step
        self.engine.load_optimizer_state(checkpoint.tensors("optimizer"))
        if self.averaged is not None:
            path = checkpoint.folder / "averaged.safetensors"
            load_exactly(self.averaged.network, checkpoint.tensors("averaged"), path)
        totals = checkpoint.state["log"]
        self.log.restore(totals if self.world.is_main else dict.fromkeys(totals, 0.0))
