"""Training from a configuration to a run folder: file -> loader -> condition -> attack -> forward -> loss -> engine."""

import gc
import pathlib
from collections.abc import Callable
from dataclasses import asdict

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
from oat_dist.engine import Engine
from oat_dist.evaluation import EvaluationAttack, Plan
from oat_dist.graphed import graph_replay
from oat_dist.guard import Guard, guard_action, needs_validation, read_collapse
from oat_dist.losses import attack_plan, robust_term
from oat_dist.metrics import MetricsWriter
from oat_dist.models import build_model, model_channels
from oat_dist.models.init_from import initialise_from
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.slimming import idle_parameters, widths_of_step
from oat_dist.optim import AveragedNetwork, learning_rate
from oat_dist.progress import progress_bar
from oat_dist.resume import RunLock, open_run, rewind
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
    extra = world.on_main(lambda: _open_extra(config, data))
    loader = TrainLoader(data, config, rank=world.rank, ranks=world.ranks, device=world.device)
    lock = RunLock()
    run, checkpoint = world.on_main(lambda: open_run(config, data, world.ranks, lock, extra=extra))
    try:
        training = _trained(config, data, loader, world, run, checkpoint, after_epoch)
        cfg = config.evaluation
        report.measure(
            training.finish(),
            data,
            Plan(lambdas=cfg.lambdas, attack=EvaluationAttack.of(config), seed=config.seed),
            config=config,
            split=cfg.split,
            batch_size=cfg.batch_size,
            world=world,
            stem=run / "frontier",
            more={"collapse": asdict(training.collapse)} if training.collapse else None,
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
    validates = config.evaluation.interval_epochs or needs_validation(config, data)
    splits = {"train", config.evaluation.split} | ({"val"} if validates else set())
    for split in sorted(splits):
        data.file(split, config.data.loader)
    return data


def _open_extra(config: Config, data: PreparedData) -> PreparedData | None:
    """The data set of `data.extra`, with its training split checked."""
    extra = data_sets.open_extra(data, config.data)
    if extra is not None:
        extra.file("train", config.data.loader)
    return extra


def _trained(
    config: Config, data: PreparedData, loader: TrainLoader, world: World, run: pathlib.Path,
    checkpoint: Checkpoint | None, after_epoch: AfterEpoch | None,
) -> "Training":  # fmt: skip
    """Train to the end; after a collapse anew from the last good checkpoint, as a run that is resumed there."""
    training = Training(config, data, loader, world=world, run=run, checkpoint=checkpoint)
    if training.fit(after_epoch):
        return training
    # Two networks need not fit into memory; DeepSpeed's engine is part of reference cycles.
    del training
    gc.collect()
    checkpoint = world.on_main(lambda: rewind(run, keep=config.checkpoint.keep))
    return _trained(config, data, loader, world, run, checkpoint, after_epoch)


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
        self.collapse = world.on_main(lambda: read_collapse(run))
        is_guarded = self.collapse is None and guard_action(config) != "none"
        self.guard = Guard(config, data, world=world, store=self.store) if is_guarded else None
        self.plan = attack_plan(config, multi_step=self.collapse is not None)
        self.step = 0
        if checkpoint is not None:
            self._restore(checkpoint)

    @property
    def best_so_far(self) -> torch.nn.Module:
        """The network that is evaluated: the average where there is one."""
        return self.averaged.network if self.averaged else self.network

    def fit(self, after_epoch: AfterEpoch | None = None) -> bool:
        """Run all steps that are left; the host waits for the device on log steps and at checkpoints alone.

        Returns:
            Whether training is complete; if not, the guard found a collapse, and it goes on in another `Training` from
            the newest checkpoint.

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
            for epoch in range(first_epoch, first_epoch if self._is_stopped else config.optim.epochs):
                for at, micro_batches in enumerate(loader.epoch(epoch, first_step), start=first_step):
                    self._take_step(sampler, micro_batches, epoch, at, learning_rate(config.optim, self.step, total))
                    if self.step % config.logging.interval_steps == 0 or self.step == total:
                        self.watch.check(self.store.newest)
                        lr = learning_rate(config.optim, self.step - 1, total)
                        values, images = self.log.flush()
                        metrics.write(self.step, {"epoch": epoch, "lr": lr, **values}, images=images)
                        advance(f"epoch {epoch + 1}, loss {values['loss']:.3f}")
                    else:
                        advance()
                first_step = 0
                if not self._end_epoch(epoch, metrics):
                    return False
                if after_epoch is not None:
                    self._average_statistics()
                    self.watch.check(self.store.newest)
                    after_epoch(epoch + 1, self.best_so_far)
        self.store.wait()
        return True

    def finish(self) -> torch.nn.Module:
        """Write model.safetensors - the best network by validation score, or the last - and return it."""
        final = self.best_so_far
        if self.validator is not None:
            if self._is_stopped:  # after an epoch that need not be one that validates
                self.validator.measure(final, self.step)
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
                    plan=self.plan, replay=self.replay, step=at, width=width, teacher=teacher,
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

    @property
    def _is_stopped(self) -> bool:
        return self.collapse is not None and self.collapse.action == "stop"

    def _end_epoch(self, epoch: int, metrics: MetricsWriter) -> bool:
        """Look for a collapse, validate and checkpoint where it is time; whether training may go on."""
        done, is_last = epoch + 1, epoch + 1 == self.config.optim.epochs
        validates = self.validator is not None and (done % self.config.evaluation.interval_epochs == 0 or is_last)
        # A guarded run saves every epoch: how far a collapse throws it back must not depend on the interval.
        saves = self.guard is not None or done % self.config.checkpoint.interval_epochs == 0 or is_last
        if validates or saves:
            self._average_statistics()
            self.watch.check(self.store.newest)
            self._require_finite(self._networks())
        if self.guard is not None and not self.guard.passes(self.network, metrics, epoch=done, step=self.step):
            return False
        if validates:
            metrics.write(self.step, self.validator.measure(self.best_so_far, self.step))
        if saves:
            self._save()
        return True

    def _average_statistics(self) -> None:
        self.world.average_running_statistics([self.network] + ([self.averaged.network] if self.averaged else []))

    def _save(self) -> None:
        """Hand everything to the checkpoint store; every rank takes part in gathering."""
        state = {"step": self.step, "log": self.log.collapse(), "config": to_dict(self.config)}
        if self.guard is not None:
            state["guard_best"] = self.guard.best
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
        require_finite(parts, self.step, world=self.world, last_good=self.store.newest)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Everything but the weights, which had to be there before the engine."""
        self.step = checkpoint.step
        self.engine.load_optimizer_state(checkpoint.tensors("optimizer"))
        if self.averaged is not None:
            path = checkpoint.folder / "averaged.safetensors"
            load_exactly(self.averaged.network, checkpoint.tensors("averaged"), path)
        if self.guard is not None:
            self.guard.best = checkpoint.state.get("guard_best", self.guard.best)
        totals = checkpoint.state["log"]
        self.log.restore(totals if self.world.is_main else dict.fromkeys(totals, 0.0))
