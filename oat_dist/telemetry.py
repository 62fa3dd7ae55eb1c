"""What is known of training at a log step: sums of losses and accuracies, where the time went, one line to read."""

from collections.abc import Callable

from torch import Tensor

from oat_dist.config import Config
from oat_dist.distributed import World
from oat_dist.interval_line import PHASES, interval_line
from oat_dist.lambda_log import LambdaLog
from oat_dist.metrics import MetricsWriter
from oat_dist.step import StepLosses
from oat_dist.step_log import WidthLogs
from oat_dist.stopwatch import Stopwatch, peak_memory_mib

_MIB = 2**20


class Telemetry:
    """Takes note of every step; nothing waits for the device until `report`."""

    def __init__(self, world: World, config: Config) -> None:
        """Nothing noted yet.

        Args:
            world: The ranks.
            config: Of the run; it says how lambda is drawn, and at which widths.
        """
        self.world, self.clock = world, Stopwatch(world.device)
        self._log = WidthLogs(config.model.widths, world)
        self._by_lambda = LambdaLog(world, config.conditioning)
        self._grad_norm: Tensor | None = None
        self._sent_bytes, self._steps = 0.0, 0
        self.clock.start()

    def add(self, width: float, losses: StepLosses, lam_N: Tensor) -> None:
        """Take note of a micro-batch at a width; by lambda the whole network counts alone.

        Args:
            width: Share of the channels.
            losses: Its losses and counts.
            lam_N: [N] float64 on the host.
        """
        robust = int((lam_N.numpy() > 0).sum())
        self._log.add(width, losses.counts, images=len(lam_N), clean=losses.num_clean, robust=robust)
        if width == 1:
            self._by_lambda.add(losses, lam_N)

    def end_step(self, grad_norm: Tensor) -> None:
        """Take note of the end of a step.

        Args:
            grad_norm: Norm of its gradient.
        """
        self._grad_norm, self._steps = grad_norm, self._steps + 1

    def communicate(self, call: Callable[[], object], sent_bytes: float) -> object:
        """Do a collective of the engine, whose time and bytes are counted apart.

        Args:
            call: The collective.
            sent_bytes: What this rank sends.
        """
        self.clock.mark("train")
        result = call()
        self.clock.mark("communication")
        self._sent_bytes += sent_bytes
        return result

    def report(self, metrics: MetricsWriter, step: int, total: int, *, epoch: int, lr: float) -> str:
        """Write what was noted since the last report, and print it on the main rank; every rank must call.

        Args:
            metrics: Where to.
            step: Optimiser steps done.
            total: Of the whole run.
            epoch: Epoch, from 0.
            lr: Learning rate of the step.

        Returns:
            The printed line.
        """
        values, images = self._log.flush()
        values |= self._by_lambda.flush()
        if self._grad_norm is not None:
            values["grad_norm"] = float(self._grad_norm)
        phases_ms = self.clock.read_ms()
        spent_ms = sum(phases_ms.values())
        timing = {f"share_{phase}": phases_ms.get(phase, 0.0) / spent_ms for phase in PHASES} if spent_ms else {}
        timing["peak_memory_mib"] = peak_memory_mib(self.world.device)
        timing["sent_mib_per_step"] = self._sent_bytes / _MIB / max(self._steps, 1)
        self._sent_bytes, self._steps = 0.0, 0
        values = {"epoch": epoch, "lr": lr, **values}
        line = interval_line(step, total, values, metrics.write(step, values, images=images, timing=timing))
        if self.world.is_main:
            print(line, flush=True)
        self.clock.start()
        return line

    def collapse(self) -> dict:
        """All sums over ranks since the last report, which the main rank alone goes on with."""
        return {"sums": self._log.collapse(), "by_lambda": self._by_lambda.collapse()}

    def restore(self, noted: dict) -> None:
        """Go on from what `collapse` gave, which the main rank alone counts; every rank must call."""
        sums = noted["sums"]
        self._log.restore(sums if self.world.is_main else dict.fromkeys(sums, 0.0))
        if self.world.is_main:
            self._by_lambda.restore(noted["by_lambda"])
