"""One run while it goes on: steps taken, epochs ended, checkpoints written; `oat_dist.trainer` starts it."""

import pathlib
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from oat_dist import runs
from oat_dist.attacks import AttackPlan
from oat_dist.bad_steps import StepHealth
from oat_dist.checkpoint import Checkpoint, CheckpointStore
from oat_dist.conditioning import LambdaSampler
from oat_dist.config import Config, to_dict
from oat_dist.data import Batch, PreparedData, TrainLoader
from oat_dist.distributed import World
from oat_dist.divergence import require_finite
from oat_dist.engine import Engine
from oat_dist.errors import PreemptedError
from oat_dist.graphed import GraphReplay, graph_replay
from oat_dist.guard import Guard, guard_action, read_collapse
from oat_dist.hang import HangWatch
from oat_dist.interruption import StopSignals
from oat_dist.losses import attack_plan
from oat_dist.metrics import MetricsWriter, open_metrics
from oat_dist.models import build_model
from oat_dist.models.init_from import initialise_from
from oat_dist.models.network import ConditionalNetwork
from oat_dist.models.slimming import idle_parameters, widths_of_step
from oat_dist.optim import AveragedNetwork, learning_rate
from oat_dist.profiling import profiled_steps
from oat_dist.progress import progress_bar
from oat_dist.step import training_losses
from oat_dist.telemetry import Telemetry
from oat_dist.validation import Validator
from oat_dist.weight_perturbation import WeightPerturbation
from oat_dist.weights import load_exactly

AfterEpoch = Callable[[int, ConditionalNetwork], None]
"""(epochs done, the network that would be evaluated): called on every rank, after the epoch's checkpoint."""


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
        signals: StopSignals | None = None,
    ) -> None:
        """Build network, engine and average, at their start or where a checkpoint left them.

        Args:
            config: Everything about the run.
            data: Its data set.
            loader: Training batches of this rank.
            world: The ranks.
            run: Folder of the run.
            checkpoint: Where to go on, or None.
            signals: Ask whether to stop; default: nobody asks.
        """
        self.signals = signals or StopSignals(world)
        self.config, self.data, self.loader, self.world, self.run = config, data, loader, world, run
        self.network = starting_network(config, data, checkpoint).to(world.device)
        # Weights first: DeepSpeed takes its own copies of them. Its optimiser state exists only afterwards.
        self.engine = Engine(self.network, config, world)
        self.averaged = AveragedNetwork(self.network, config.optim.ema_decay) if config.optim.ema_decay else None
        self.perturbation = WeightPerturbation(self.network, config.optim.awp_gamma, world)
        self.store = CheckpointStore(run / "checkpoints", keep=config.checkpoint.keep)
        self.idle = {width: tuple(idle_parameters(self.network, width)) for width in config.model.widths}
        self.log = Telemetry(world, config)
        self.health = StepHealth(world, run, self.network, max_bad_steps=config.engine.max_bad_steps)
        self.hang = HangWatch(world, config.engine.hang_timeout_s)
        self.validator = Validator(config, data, world=world, run=run) if config.evaluation.interval_epochs else None
        self.collapse = world.on_main(lambda: read_collapse(run))
        is_guarded = self.collapse is None and guard_action(config) != "none"
        self.guard = Guard(config, data, world=world, store=self.store) if is_guarded else None
        self.plan: AttackPlan | None = None
        self.replay: GraphReplay | None = None
        self.step, self._saved_step = 0, None
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
            PreemptedError: A signal asked to stop; there is a checkpoint.
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
            open_metrics(config, self.run, is_main=world.is_main) as metrics,
            progress_bar("training", total, is_main=world.is_main, done=self.step) as advance,
            self.signals.deferred(),
            self.hang,
            self.engine.metered(self.log.communicate),
            profiled_steps(self.run, world.rank, config.logging.profile_steps) as profiled,
        ):
            first_epoch, first_step = divmod(self.step, loader.steps_per_epoch)
            for epoch in range(first_epoch, first_epoch if self._is_stopped else config.optim.epochs):
                self._choose_attack(epoch)
                for at, micro_batches in enumerate(loader.epoch(epoch, first_step), start=first_step):
                    self._take_step(sampler, micro_batches, epoch, at, learning_rate(config.optim, self.step, total))
                    if self.step % config.logging.interval_steps == 0 or self.step == total:
                        self.health.check(self.store.newest)
                        lr = learning_rate(config.optim, self.step - 1, total)
                        self.log.report(metrics, self.step, total, epoch=epoch, lr=lr)
                    advance(f"epoch {epoch + 1}")
                    profiled()
                    stops = self.signals.agreed()
                    if stops and at + 1 < loader.steps_per_epoch:
                        self._stop_here(within_epoch=True)
                first_step = 0
                with self.hang.paused():
                    goes_on = self._end_epoch(epoch, metrics)
                self.log.clock.start()
                if not goes_on:
                    return False
                if stops:
                    self._stop_here(within_epoch=False)
                if after_epoch is not None:
                    with self.hang.paused():
                        self._average_statistics()
                        self.health.check(self.store.newest)
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

    def _choose_attack(self, epoch: int) -> None:
        """The attack of an epoch; a new one needs new recordings, since a recording belongs to one plan."""
        config = self.config
        plan = attack_plan(config, multi_step=self.collapse is not None, epoch=epoch)
        if plan != self.plan:
            shapes = 8 * len(config.model.widths)
            self.plan = plan
            self.replay = graph_replay(config.engine.cuda_graph, self.world.device, name="attack", most_shapes=shapes)

    def _take_step(self, sampler: LambdaSampler, micro_batches: list, epoch: int, at: int, lr: float) -> None:
        """One optimiser step: condition, attack, forward, loss, backward for every micro-batch and width."""
        self.health.begin()
        self.log.clock.mark("data")
        step, done, grad_norm = self.step + 1, [], None
        batches = [(batch, sampler.draw(epoch, at, batch.position_N, batch.index_N)) for batch in micro_batches]
        for (batch, lam_N), x_adv in zip(batches, self._perturb_weights(batches, epoch, at), strict=True):
            teacher = None
            for width in widths_of_step(self.config.model, self.config.seed, self.step):
                self.hang.note(f"attack or forward of step {step}")
                losses = training_losses(
                    self.network, batch, lam_N, config=self.config, epoch=epoch, forward=self.engine.forward,
                    plan=self.plan, replay=self.replay, step=at, width=width, teacher=teacher, x_adv=x_adv,
                    on_attacked=lambda: self.log.clock.mark("attack"),
                )  # fmt: skip
                self.hang.note(f"backward or update of step {step}")
                grad_norm = self.engine.backward_and_step(
                    self.config.width_weight(width) * losses.loss_N,
                    lr,
                    self.idle[width],
                    before_update=self.perturbation.restore,
                )
                self.health.add(step, epoch, batch.index_N, lam_N, losses.loss_N)
                done.append((width, losses, lam_N))
                self.log.clock.mark("train")
                if self.config.loss.distill_widths and width == 1:
                    teacher = losses
        if not self.health.is_good(step, grad_norm):
            done.clear()
        for counted in done:
            self.log.add(*counted)
        self.log.end_step(grad_norm)
        if done and self.averaged is not None:
            self.averaged.update(self.step)
        self.log.clock.mark("train")
        self.step += 1
        self.hang.note(f"the images after step {self.step}")

    def _perturb_weights(self, batches: list[tuple[Batch, Tensor]], epoch: int, at: int) -> list[Tensor | None]:
        """Move the weights to where the gradient of this step is taken, if they are to move.

        Returns:
            The adversarial images that it took, of every micro-batch; or None of each where nothing moves.
        """
        cfg, made = self.config.optim, []
        if not cfg.awp_gamma or self.step < cfg.awp_warmup_share * cfg.epochs * self.loader.steps_per_epoch:
            return [None] * len(batches)
        self.hang.note(f"weight perturbation of step {self.step + 1}")
        with self.perturbation.ascent():
            for batch, lam_N in batches:
                losses = training_losses(
                    self.network, batch, lam_N, config=self.config, epoch=epoch, forward=self.engine.forward_alone,
                    plan=self.plan, replay=self.replay, step=at, on_attacked=lambda: self.log.clock.mark("attack"),
                )  # fmt: skip
                self.perturbation.add(losses.loss_N)
                made.append(losses.x_adv)
                self.log.clock.mark("train")
        return made

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
            self.health.check(self.store.newest)
            self._require_finite(self._networks())
        if self.guard is not None and not self.guard.passes(self.network, metrics, epoch=done, step=self.step):
            return False
        if validates:
            metrics.write(self.step, self.validator.measure(self.best_so_far, self.step))
        if saves:
            self._save()
        return True

    def _stop_here(self, *, within_epoch: bool) -> NoReturn:
        """Leave with a checkpoint of this very step, from which the run goes on as if it had not been stopped.

        Raises:
            PreemptedError: On every rank, when the checkpoint is on disk.
        """
        if self._saved_step != self.step:
            # Averaging moves statistics that an undisturbed run would not average here.
            own_RF = self.world.gather_running_statistics(self._trained_and_averaged)
            self._average_statistics()
            self.health.check(self.store.newest)
            self._require_finite(self._networks())
            self._save({"statistics": {"rank_RF": own_RF}}, within_epoch=within_epoch)
        self.world.on_main(self.store.wait)
        raise PreemptedError(f"{self.run}: stopped at step {self.step} with a checkpoint; the same command goes on")

    @property
    def _trained_and_averaged(self) -> list[torch.nn.Module]:
        return [self.network] + ([self.averaged.network] if self.averaged else [])

    def _average_statistics(self) -> None:
        self.world.average_running_statistics(self._trained_and_averaged)

    def _save(self, more: dict[str, dict[str, Tensor]] | None = None, *, within_epoch: bool = False) -> None:
        """Hand everything, and more parts, to the checkpoint store; every rank takes part in gathering."""
        state = {"step": self.step, "log": self.log.collapse(), "config": to_dict(self.config)}
        if self.guard is not None:
            state["guard_best"] = self.guard.best
        state |= {"skipped_steps": self.health.skipped} | ({"within_epoch": True} if within_epoch else {})
        optimizer = {"optimizer": self.engine.optimizer_state()}
        self._require_finite(optimizer)
        if self.world.is_main:
            self.store.save(state, self._networks() | optimizer | (more or {}))
        self._saved_step = self.step

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
        self.health.skipped = checkpoint.state.get("skipped_steps", 0)
        own = checkpoint.tensors("statistics")
        if own is not None and len(own["rank_RF"]) == self.world.ranks:
            self.world.set_own_running_statistics(self._trained_and_averaged, own["rank_RF"])
        if self.guard is not None:
            self.guard.best = checkpoint.state.get("guard_best", self.guard.best)
        self.log.restore(checkpoint.state["log"])
